"""The inner half as the main process of a unit: waits for the mounts, ends politely, leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_rig import Rig, rig_of_test
from unit_rig import PTY, Unit, living

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)


@pytest.fixture
def unit(rig: Rig) -> Iterator[Unit]:
    """A unit that waits for its mounts."""
    made = Unit(rig)
    yield made
    made.close()


def test_a_unit_runs_its_agent_with_the_stdio_of_its_go(unit: Unit) -> None:
    """The agent gets the three descriptors of `G`, and its status is that of the main process."""
    code, out = unit.run("sh", "-c", "echo out; echo err >&2; ls /proc/self/fd; exit 7")
    assert (code, out) == (7, b"out\nerr\n0\n1\n2\n3\n")
    assert unit.until("E") == b"\0\0\0\0\7"


@pytest.mark.parametrize("broker", ["looks", "is gone", "is silent"])
def test_a_unit_stays_until_its_cgroup_was_looked_at(unit: Unit, broker: str) -> None:
    """With its last process the cgroup goes, and what was counted there: it waits for the broker, half a second."""
    unit.looks = broker == "looks"
    unit.begin()
    began = time.monotonic()
    with open(os.devnull, "r+b") as null:
        unit.go("sh", "-c", "exit 3", stdio=[null.fileno()] * 3)
    unit.until("E")
    if broker == "is gone":
        unit.channel.close()
    assert unit.process.wait(5) == 3
    assert broker != "is silent" or time.monotonic() - began >= 0.5


def test_the_probe_says_what_a_unit_is(unit: Unit) -> None:
    """What the namespace run proves, and besides a uid of its own without capabilities; no claim to be PID 1."""
    found = set(unit.begin())
    uid = 4242 if os.getuid() == 0 else os.getuid()
    expected = {"write:/usr=denied", "connect:192.0.2.1:9=denied", "userns=denied", "egress=allowed"}
    expected |= {"seccomp=2", "no-new-privs=1", f"uid={uid}", "capabilities=none", "subreaper=1", "loopback=allowed"}
    assert expected | {"verdict=passed"} <= found
    assert not [item for item in found if item.startswith("pid=")]


def test_nothing_is_tried_before_the_mounts_are_there(rig: Rig) -> None:
    """The relay's socket may come after the start of the unit: the probe waits for `B`."""
    path = rig.relay.path
    aside = path.with_suffix(".aside")
    path.rename(aside)
    unit = Unit(rig)
    time.sleep(0.2)
    aside.rename(path)
    assert "verdict=passed" in unit.begin()
    unit.close()


@pytest.mark.parametrize("more", [["--cap-add", "CAP_NET_ADMIN"], ["--uid", "0"]])
def test_a_unit_with_a_capability_or_as_root_does_not_run(rig: Rig, more: list[str]) -> None:
    """`User=` or `CapabilityBoundingSet=` that did not take effect: verdict failed, 125, and no agent."""
    unit = Unit(rig, more=more)
    assert "verdict=failed" in unit.begin()
    assert unit.process.wait(5) == 125
    unit.close()


def test_a_unit_without_a_filter_does_not_run(rig: Rig) -> None:
    """`SystemCallFilter=` that did not take effect is noticed."""
    unit = Unit(rig, seccomp=False)
    assert {"seccomp=0", "userns=allowed", "verdict=failed"} <= set(unit.begin())
    assert unit.process.wait(5) == 125
    unit.close()


def test_only_a_unit_takes_its_channel_from_standard_input(rig: Rig) -> None:
    """`--ctl 0` without `--unit` is refused: standard input is the agent's there."""
    ended = subprocess.run([rig.shim, "inner", "--ctl", "0", "--egress", "/x"], input=b"", check=False, timeout=5)
    assert ended.returncode == 125


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_a_go_has_three_descriptors(unit: Unit, count: int) -> None:
    """A go with too few or too many descriptors ends the run: an agent's stdio is never somebody else's."""
    unit.begin()
    with Path(os.devnull).open("rb") as null:
        unit.go("true", stdio=[null.fileno()] * count)
        assert unit.process.wait(5) == 125


@pytest.mark.parametrize("first", ["G", "S", "X", "M", "Q"])
def test_nothing_comes_before_the_mounts(unit: Unit, first: str) -> None:
    """Any other first frame than `B` or `K` ends the unit, and so does a `B` with a payload."""
    unit.channel.send(first)
    assert unit.process.wait(5) == 125


def test_a_terminal_is_the_units_own(unit: Unit) -> None:
    """With a pty the go has no descriptors; the master comes out, and the agent has a controlling terminal."""
    unit.begin()
    unit.go("sh", "-c", "test -t 0 && tty && stty size >/dev/tty", flags=PTY)
    (master,) = unit.frame("M").descriptors
    unit.channel.send("M", bytes(4))
    assert unit.process.wait(10) == 0
    assert os.read(master, 999).splitlines() == [b"/dev/pts/0", b"0 0"]
    os.close(master)


AGENT = "trap 'echo polite; exit 9' TERM; echo up; while :; do sleep 0.02; done"


def started(unit: Unit, *command: str) -> int:
    """Start a command whose first line is `up`; return the descriptor of its output."""
    unit.begin()
    reading, writing = os.pipe()
    with Path(os.devnull).open("rb") as null:
        unit.go(*command, stdio=[null.fileno(), writing, writing])
    os.close(writing)
    assert os.read(reading, 3) == b"up\n"
    return reading


def test_systemd_stop_asks_the_agent_and_takes_its_status(unit: Unit) -> None:
    """SIGTERM to the main process reaches the agent, which may clean up; what it says last is the unit's status."""
    reading = started(unit, "sh", "-c", AGENT)
    unit.stop(signal.SIGTERM)
    assert unit.process.wait(5) == 9
    assert os.read(reading, 99).endswith(b"polite\n")  # before it, a shell may say what else was ended
    os.close(reading)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_agent_that_a_stop_ends_is_128_plus_n(unit: Unit, number: int) -> None:
    """Also when it was stopped: it is continued, so that it can end."""
    os.close(started(unit, "sh", "-c", "echo up; kill -STOP $$; sleep 60"))
    unit.until("Z")
    unit.stop(number)
    assert unit.process.wait(5) == 128 + number


def test_a_stop_before_the_go_ends_the_unit_at_once(unit: Unit) -> None:
    """SIGTERM while it waits for its mounts or its go: 143, and nothing ever ran."""
    unit.begin()
    unit.stop(signal.SIGTERM)
    assert unit.process.wait(5) == 143


def leaving(rig: Rig, mark: str) -> str:
    """Return a script that leaves processes behind in every way: sessions of their own, orphans, deaf to signals."""
    tool = rig.work / mark
    tool.write_text("#!/bin/sh\ntrap '' TERM HUP INT\nwhile :; do sleep 0.05; done\n")
    tool.chmod(0o755)
    return f"for i in 1 2 3; do setsid {tool} & (setsid {tool} &) ; done; (({tool} &) &); sleep 0.2; echo up; "


@pytest.mark.parametrize("ending", ["agent", "kill", "closed", "stop"])
def test_nothing_outlives_the_unit(rig: Rig, unit: Unit, ending: str) -> None:
    """Orphans with sessions of their own end with the agent, at `K`, when the broker is gone, and at a stop.

    No PID namespace and no cgroup helps here; processes of another run of the same uid live on.
    """
    other = Unit(rig)
    theirs, ours = f"theirs-{os.getpid()}", f"ours-{os.getpid()}"
    other_output = started(other, "sh", "-c", leaving(rig, theirs) + "sleep 60")
    output = started(unit, "sh", "-c", leaving(rig, ours) + ("exit 3" if ending == "agent" else "sleep 60"))
    if ending == "kill":
        unit.channel.send("K")
    elif ending == "closed":
        unit.channel.close()
    elif ending == "stop":
        unit.stop(signal.SIGTERM)
    assert unit.process.wait(15) == {"agent": 3, "kill": 137, "closed": 125, "stop": 143}[ending]
    assert living(ours) == set()
    assert len(living(theirs)) >= 7
    other.close()
    for pid in living(theirs):
        with contextlib.suppress(ProcessLookupError):  # its channel has closed: it may be ending by itself
            os.kill(pid, signal.SIGKILL)
    os.close(output)
    os.close(other_output)


def test_a_storm_of_forks_ends_with_the_unit(unit: Unit) -> None:
    """Attack: children that fork a successor as they are killed. Within bounds, none is left."""
    mark = f"storm-{os.getpid()}"
    script = (
        "import os, time\nos.write(1, b'up\\n')\n"
        "for _ in range(8): os.fork()\n"
        "while True:\n time.sleep(0.002)\n pid = os.fork()\n if pid: os._exit(0)\n os.setsid()\n"
        f"# {mark}"
    )
    unit.begin()
    reading, writing = os.pipe()
    with Path(os.devnull).open("rb") as null:
        unit.go("/usr/bin/python3", "-c", script, stdio=[null.fileno(), writing, writing])
    assert unit.process.wait(60) == 0
    assert living(mark) == set()
    os.close(reading)
    os.close(writing)
