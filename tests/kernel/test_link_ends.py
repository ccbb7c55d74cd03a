"""Every way a run behind the link can end: it ends, is told with its reason, and leaves nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from keeper_rig import PTY, Keeper, Place, place_of_test

from cloister.host import frames

pytestmark = pytest.mark.kernel
place = pytest.fixture(place_of_test)


@pytest.fixture
def keeper(place: Place) -> Iterator[Keeper]:
    """A keeper that waits for its `B`."""
    made = Keeper(place)
    yield made
    made.close()


def asleep(keeper: Keeper) -> None:
    """Begin, and start an agent that sleeps."""
    keeper.begin()
    with open(os.devnull, "r+b") as null:
        keeper.go("/bin/sleep", "60", stdio=[null.fileno()] * 3)
    keeper.until("R", 0)


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def below(pid: int) -> set[int]:
    """Return a process and all that lives below it."""
    return {pid}.union(*(below(child) for child in children(pid)))


def all_gone(pids: set[int], timeout_s: float = 5) -> bool:
    """Whether these processes end."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}/exe").is_symlink() and _alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_killed_monitor_is_told_with_its_last_line(keeper: Keeper) -> None:
    """The monitor dies under the agent: `D` with the reason, then `E` 0 with 137, and nothing lives."""
    asleep(keeper)
    lives = below(keeper.pid)
    os.kill(children(keeper.pid)[0], signal.SIGKILL)
    assert keeper.died() == {
        "reason": "monitor-ended",
        "text": "the monitor ended by itself (signal 9)",
        "console": "a guest without a machine",
        "status": "signal 9",
    }
    assert keeper.ended() == 137
    assert keeper.over(5) == 137
    assert all_gone(lives)


def test_it_stays_until_the_broker_has_looked_at_its_cgroup(keeper: Keeper) -> None:
    """With the keeper goes what the kernel counted: so it waits for an answer, and goes at once with it."""
    keeper.answers = False
    asleep(keeper)
    os.kill(children(keeper.pid)[0], signal.SIGKILL)
    keeper.died()
    keeper.ended()
    time.sleep(0.3)
    assert keeper.process.poll() is None
    began = time.monotonic()
    keeper.channel.send("S", b"\x0f\0\0\0\0")  # a signal for nobody is no answer
    time.sleep(0.1)
    assert keeper.process.poll() is None
    keeper.channel.send("D")
    assert keeper.over(5) == 137
    assert time.monotonic() - began < 1


def test_it_does_not_wait_for_ever(keeper: Keeper) -> None:
    """A broker that says nothing is waited for two seconds."""
    keeper.answers = False
    asleep(keeper)
    os.kill(children(keeper.pid)[0], signal.SIGKILL)
    keeper.died()
    assert keeper.over(10) == 137


def test_a_monitor_that_dies_before_the_agent_runs_is_a_failed_start(keeper: Keeper) -> None:
    """The same before `R`: `Y` 0 at the stage `monitor`, and 125."""
    keeper.begin()
    os.kill(children(keeper.pid)[0], signal.SIGKILL)
    assert keeper.died()["reason"] == "monitor-ended"
    assert keeper.until("Y", 0)[8:] == b"monitor"
    assert keeper.over(5) == 125


def test_a_guest_that_powers_off_is_told_as_such(keeper: Keeper) -> None:
    """PID 1 of the guest dies: the run ends with what the console said last."""
    asleep(keeper)
    (guest,) = children(children(keeper.pid)[0])
    os.kill(guest, signal.SIGKILL)
    assert keeper.died()["reason"] in {"monitor-ended", "guest-ended"}
    assert keeper.ended() == 137


def test_a_monitor_that_is_not_there_is_told(place: Place) -> None:
    """A program that cannot be executed: its error stands on the console, and so in the reason."""
    keeper = Keeper(place, monitor=["/nowhere/qemu"])
    keeper.send_begin()
    died = keeper.died()
    assert died["status"] == "exit code 125"
    assert "cannot be executed: No such file or directory" in died["console"]
    assert keeper.over(5) == 125


def test_a_killed_keeper_takes_everything_with_it(keeper: Keeper) -> None:
    """The keeper is PID 1 of the jail: its death is that of monitor, guest and commands."""
    asleep(keeper)
    lives = below(keeper.pid)
    assert len(lives) >= 4
    os.kill(keeper.pid, signal.SIGKILL)
    assert all_gone(lives)


def test_a_broker_that_leaves_ends_the_run(keeper: Keeper) -> None:
    """No broker, no machine."""
    asleep(keeper)
    lives = below(keeper.pid)
    keeper.channel.close()
    assert keeper.over(5) == 125
    assert all_gone(lives)


def test_a_kill_lets_the_guest_unmount_first(keeper: Keeper) -> None:
    """`K`: everything in the guest is killed and unmounted, then the monitor ends: 137."""
    asleep(keeper)
    keeper.channel.send("K")
    assert keeper.over(5) == 137
    assert "unmounted" in keeper.said()


def test_a_kill_does_not_wait_for_a_guest_that_hangs(keeper: Keeper) -> None:
    """Attack: a guest that answers nothing any more is killed after its two seconds."""
    asleep(keeper)
    (guest,) = children(children(keeper.pid)[0])
    os.kill(guest, signal.SIGSTOP)
    started = time.monotonic()
    keeper.channel.send("K")
    assert keeper.over(6) == 137
    assert 1.5 < time.monotonic() - started < 4


def test_a_kill_before_the_guest_is_there_ends_at_once(place: Place) -> None:
    """Nothing was mounted: there is nothing to wait for."""
    keeper = Keeper(place, monitor=["/bin/sleep", "60"])
    keeper.send_begin()
    time.sleep(0.2)
    keeper.channel.send("K")
    assert keeper.over(1) == 137


def test_an_agent_that_kills_the_inner_half_ends_its_run(keeper: Keeper) -> None:
    """The inner half has the agent's uid: who kills it ends the run, 137, and disks are clean."""
    keeper.begin()
    with open(os.devnull, "r+b") as null:
        keeper.go("/bin/sh", "-c", "sleep 0.3; kill -9 $PPID; sleep 60", stdio=[null.fileno()] * 3)
    assert keeper.ended() == 137
    assert "unmounted" in keeper.said()


def test_the_monitor_starts_with_the_begin_and_not_before(place: Place) -> None:
    """So that the broker can put the limits of the run around it first."""
    keeper = Keeper(place)
    time.sleep(0.3)
    assert children(keeper.pid) == []
    assert keeper.begin()
    assert len(children(keeper.pid)) == 1
    keeper.close()


@pytest.mark.parametrize("kind", ["G", "X", "S", "M", "T", "Z"])
def test_orders_before_the_begin_end_it(place: Place, kind: str) -> None:
    """A broker that says something out of turn is not one: nothing is started."""
    keeper = Keeper(place)
    keeper.channel.send(kind, bytes(4))
    assert keeper.over(5) == 125
    keeper.close()


def test_the_console_is_kept_within_its_bound(place: Place) -> None:
    """A guest that prints without end fills two files of the bound, and the newest text is in FILE."""
    script = "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); echo line $i; done; exec sleep 60"
    keeper = Keeper(place, monitor=["/bin/sh", "-c", script])
    keeper.send_begin()
    end = time.monotonic() + 20
    while "line 40000" not in keeper.said() and time.monotonic() < end:
        time.sleep(0.05)
    older = keeper.console.with_name("console.log.1")
    assert keeper.said().endswith("line 40000\n")
    assert keeper.console.stat().st_size <= 65536
    assert older.stat().st_size <= 65536
    assert int(keeper.said().splitlines()[1].split()[1]) > int(older.read_text().splitlines()[1].split()[1])
    keeper.close()


def test_the_last_line_is_shown_without_control_characters(place: Place) -> None:
    """Attack: a guest's console cannot write escapes into the terminal of whoever reads the reason."""
    keeper = Keeper(place, monitor=["/bin/sh", "-c", r"printf 'first\nKernel panic \033]0;x\007\302\233\n\n'; exit 3"])
    keeper.send_begin()
    assert keeper.died()["console"] == "Kernel panic ?]0;x???"
    keeper.close()


def test_a_monitor_gets_its_descriptors_and_nothing_of_the_keepers(place: Place) -> None:
    """Descriptors of the plan keep their numbers; 20 is the channel, 21 the console; nothing of the broker's."""
    plan = os.open("/dev/zero", os.O_RDONLY)
    monitor = ["/bin/sh", "-c", "ls -l /proc/self/fd | awk '{print $9, $11}'; echo over; exec sleep 60"]
    keeper = Keeper(place, monitor=monitor, pass_fds=[plan])
    keeper.send_begin()
    end = time.monotonic() + 10
    while "over" not in keeper.said() and time.monotonic() < end:
        time.sleep(0.02)
    found = dict(line.split() for line in keeper.said().splitlines() if len(line.split()) == 2)
    assert found[str(plan)] == "/dev/zero"
    assert found["0"] == "/dev/null"
    assert found["20"].startswith("socket:")
    assert found["21"].startswith("pipe:") or found["21"] == found["2"]
    assert len([name for name in found.values() if name.startswith("socket:")]) == 1
    os.close(plan)
    keeper.close()


@pytest.mark.parametrize("vsock", [True, False], ids=["firecracker", "qemu"])
def test_a_monitor_writes_no_file_without_end(place: Place, tmp_path: Path, *, vsock: bool) -> None:
    """Attack: it writes into what it was given for its guest's memory until the disk is full. It is ended there.

    The bound is the largest file that it was given to write: its disks stay whole.
    """
    opened = []
    for name, size in (("disk", 3 << 20), ("memory", 1 << 20), ("image", 9 << 20)):
        path = place.directory / name
        path.touch()
        path.chmod(0o666)
        os.truncate(path, size)
        found = os.open(path, os.O_RDONLY if name == "image" else os.O_RDWR)
        opened.append(fcntl.fcntl(found, fcntl.F_DUPFD_CLOEXEC, 64))  # out of the way of the numbers of a plan
        os.close(found)
    script = (
        "cd /proc/$$/fd; of() { for f in [5-9] 1[0-9]; do case $(readlink $f) in */$1) echo $PWD/$f;; esac; done; }; "
        "printf x | dd of=$(of disk) bs=1 seek=3145727 conv=notrunc 2>&1; "
        "cat /dev/zero > $(of memory); echo status $?; exec sleep 60"
    )
    monitor = ["/bin/sh", "-c", script]
    keeper = Keeper(place, *(("--vsock", str(tmp_path / "none")) if vsock else ()), monitor=monitor, files=opened)
    keeper.send_begin()
    end = time.monotonic() + 20
    while "status" not in keeper.said() and time.monotonic() < end:
        time.sleep(0.05)
    assert f"status {128 + signal.SIGXFSZ}" in keeper.said()
    assert (place.directory / "memory").stat().st_size == 3 << 20
    assert (place.directory / "disk").read_bytes()[-1:] == b"x"
    for number in opened:
        os.close(number)
    keeper.close()


def test_a_terminal_shows_all_before_the_end_of_the_keeper(keeper: Keeper) -> None:
    """The keeper's own end takes nothing away that the terminal's user has not read yet."""
    keeper.begin()
    keeper.go("/bin/sh", "-c", "echo the very last words", flags=PTY)
    (master,) = keeper.frame("M", 0).descriptors
    keeper.channel.send("M", frames.encode_u32(0))
    assert keeper.ended() == 0
    keeper.over(5)
    assert b"the very last words" in os.read(master, 1000)
    os.close(master)


def test_an_end_that_was_told_outlives_a_signal_that_came_too_late(keeper: Keeper) -> None:
    """The agent ends by one signal, the next finds nobody: what the inner half had said before counts: 143, not 137."""
    asleep(keeper)
    (guest,) = children(children(keeper.pid)[0])
    (inner,) = children(guest)
    (agent,) = children(inner)
    os.kill(guest, signal.SIGSTOP)
    keeper.channel.send("S", bytes([signal.SIGCONT]))
    time.sleep(0.3)  # it waits in the link, before the word of the agent's end
    os.kill(agent, signal.SIGTERM)
    assert all_gone({agent, inner})
    os.kill(guest, signal.SIGCONT)
    assert keeper.ended() == 128 + signal.SIGTERM
