"""SIGKILL of any process at any stage ends the run and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from shim_rig import Rig, Run, family, rig_of_test, wait_gone

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)

STAGES = ("connected", "launched", "running")


def at_stage(rig: Rig, stage: str) -> Run:
    """Bring a run to a stage: no launch yet, waiting for go, or with an agent that has children."""
    run = Run(rig, launch=stage != "connected")
    if stage == "running":
        run.go("sh", "-c", "(setsid sleep 300 &); sleep 300 & sleep 300")
        run.until("inner", "R")
    end = time.monotonic() + 5
    wanted = {"connected": 1, "launched": 3, "running": 6}[stage]
    # With its other half gone a millisecond earlier, bubblewrap's child waits for ever: the broker ends that one.
    while len(family(run.process.pid)) < wanted or (stage == "launched" and not _speaks(run)):
        assert time.monotonic() < end
        time.sleep(0.01)
    return run


def _speaks(run: Run) -> bool:
    """Say whether the inner half is there, waiting for its go."""
    return any(b"\0inner\0" in line and b"bwrap" not in line for line in _lines(run).values())


def _lines(run: Run) -> dict[int, bytes]:
    """Return the command lines of all processes of a run but the outer half."""
    lines = {}
    for pid in family(run.process.pid):
        with contextlib.suppress(OSError):
            lines[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
    lines.pop(run.process.pid, None)
    return lines


def the(run: Run, part: str) -> int:
    """Return the host pid of a part of the run."""
    lines = _lines(run)
    match part:
        case "outer":
            return run.process.pid
        case "bwrap":
            return next(pid for pid, line in lines.items() if line.startswith(b"/usr/bin/bwrap"))
        case "inner":
            return next(pid for pid, line in sorted(lines.items()) if b"\0inner\0" in line and b"bwrap" not in line)
    return next(pid for pid, line in lines.items() if line.startswith(b"sh\0"))


@pytest.mark.parametrize(
    ("stage", "part", "code"),
    [
        ("connected", "outer", -9), ("launched", "outer", -9), ("running", "outer", -9),
        ("launched", "bwrap", 125), ("running", "bwrap", 125),
        ("launched", "inner", 125), ("running", "inner", 125),
        ("running", "agent", 137),
    ],
)  # fmt: skip
def test_a_killed_part_takes_the_run_with_it(rig: Rig, stage: str, part: str, code: int) -> None:
    """Whichever part dies, everything is gone shortly after, and the exit code tells ours from the agent's."""
    run = at_stage(rig, stage)
    members = family(run.process.pid)
    os.kill(the(run, part), signal.SIGKILL)
    assert run.wait() == code
    assert not wait_gone(members)
    run.close()


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_broker_takes_the_run_with_it(rig: Rig, stage: str) -> None:
    """When both channels close at once, the outer half reports 125 and nothing is left."""
    run = at_stage(rig, stage)
    members = family(run.process.pid)
    run.outer.close()
    run.inner.close()
    assert run.process.wait(5) == 125
    assert b"[broker-gone]" in run.process.stderr.read()
    assert not wait_gone(members)
    run.close()


def test_the_brokers_last_word_counts_although_it_has_gone(rig: Rig) -> None:
    """It names the code and closes; who sees bubblewrap's end first, and cannot tell it, still ends with that code."""
    run = at_stage(rig, "running")
    members, bwrap = family(run.process.pid), the(run, "bwrap")
    os.kill(run.process.pid, signal.SIGSTOP)
    run.outer.send("F", bytes([9]))
    run.outer.close()
    os.kill(bwrap, signal.SIGKILL)
    end = time.monotonic() + 5
    while "Z" not in Path(f"/proc/{bwrap}/stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(run.process.pid, signal.SIGCONT)
    assert run.process.wait(5) == 9, run.process.stderr.read()
    assert not wait_gone(members)
    run.close()


def test_either_lost_channel_is_enough(rig: Rig) -> None:
    """The end of one channel ends the run, whatever the broker does with the other."""
    for name in ("outer", "inner"):
        run = at_stage(rig, "running")
        members = family(run.process.pid)
        getattr(run, name).close()
        assert not wait_gone({pid: start for pid, start in members.items() if pid != run.process.pid})
        run.process.kill()
        run.close()


def test_a_silent_broker_does_not_hold_us(rig: Rig) -> None:
    """After bubblewrap has ended, the broker has three seconds to name the code; then it is 125."""
    run = Run(rig)
    run.finish = False
    run.go("true")
    started = time.monotonic()
    assert run.wait() == 125
    assert 2.5 < time.monotonic() - started < 6
    assert b"[broker-silent]" in run.process.stderr.read()
    run.close()


def test_a_kill_frame_ends_an_agent_that_ignores_signals(rig: Rig) -> None:
    """`K` needs no consent: everything in the sandbox dies."""
    run = Run(rig)
    run.go("sh", "-c", "trap '' HUP INT QUIT TERM; while :; do sleep 1; done")
    run.until("inner", "R")
    members = family(run.process.pid)
    run.inner.send("K")
    assert run.wait() == 125
    assert not wait_gone(members)
    run.close()


def test_the_agent_cannot_stop_or_kill_pid_one(rig: Rig) -> None:
    """Attack: the agent sends every signal to PID 1 and its group. The run goes on, and the broker still rules it."""
    script = "for n in $(seq 1 64); do kill -$n 1; done 2>/dev/null; echo tried; sleep 60"
    run = Run(rig)
    run.go("sh", "-c", script)
    run.until("inner", "R")
    assert run.process.stdout.readline() == b"tried\n"
    run.process.terminate()
    assert run.wait() == 143
    run.close()
