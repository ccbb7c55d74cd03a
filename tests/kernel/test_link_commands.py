"""Commands behind the link: what a caller sees of them is what he sees of commands in a namespace."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Literal

import pytest
from keeper_rig import Keeper, Place, place_of_test

from cloister.host import frames

pytestmark = pytest.mark.kernel
place = pytest.fixture(place_of_test)
MIB = 1 << 20


@pytest.fixture
def keeper(place: Place) -> Iterator[Keeper]:
    """A keeper that waits for its `B`."""
    made = Keeper(place)
    yield made
    made.close()


class Pipes:
    """Standard input, output and error of one command, with the caller's ends."""

    def __init__(self) -> None:
        (theirs_in, self.given), (self.out, theirs_out), (self.err, theirs_err) = os.pipe(), os.pipe(), os.pipe()
        self.theirs: tuple[int, ...] = (theirs_in, theirs_out, theirs_err)

    def handed_over(self) -> None:
        """Keep our own ends alone."""
        theirs, self.theirs = self.theirs, ()
        for fd in theirs:
            os.close(fd)

    def end(self, which: Literal["given", "out", "err"]) -> None:
        """Close one of our ends, once: the number may be another's afterwards."""
        if getattr(self, which) >= 0:
            os.close(getattr(self, which))
            setattr(self, which, -1)

    def close(self) -> None:
        """Close what is open."""
        self.handed_over()
        self.end("given")
        self.end("out")
        self.end("err")


def read_all(fd: int) -> bytes:
    """Read until the end."""
    parts = []
    while data := os.read(fd, MIB):
        parts.append(data)
    return b"".join(parts)


def started(keeper: Keeper, *command: str) -> Pipes:
    """Begin, and start the agent on pipes."""
    keeper.begin()
    pipes = Pipes()
    keeper.go(*command, stdio=pipes.theirs)
    pipes.handed_over()
    keeper.until("R", 0)
    return pipes


def test_the_guest_proves_its_walls_by_the_inner_half(keeper: Keeper) -> None:
    """Walls and probes in a guest are those of a unit: the same program, started by PID 1."""
    found = set(keeper.begin())
    assert {"verdict=passed", "write:/usr=denied", "egress=allowed", "capabilities=none", "seccomp=2"} <= found


def test_a_wall_that_does_not_stand_starts_nothing(keeper: Keeper) -> None:
    """A place that can be written to after all: verdict failed, and no agent."""
    found = keeper.begin(inner=["--probe-write", str(keeper.place.work)])
    assert "verdict=failed" in found
    assert keeper.until("Y", 0)[8:] == b"inner"


@pytest.mark.parametrize("code", [0, 1, 125, 255])
def test_the_agents_exit_code_comes_out(keeper: Keeper, code: int) -> None:
    """Output, errors and exit code of the agent are the caller's; the keeper leaves with the same code."""
    status, out, err = keeper.run("/bin/sh", "-c", f"cat; echo wrong >&2; exit {code}", data=b"given")
    assert (status, out, err) == (code, b"given", b"wrong\n")
    assert keeper.over(5) == code


@pytest.mark.parametrize(("command", "error"), [("/nowhere/program", 2), ("/etc/passwd", 13)])
def test_a_program_that_cannot_be_executed_is_told(keeper: Keeper, command: str, error: int) -> None:
    """Not found and not executable arrive as such: the caller gets 127 and 126."""
    keeper.begin()
    with open(os.devnull, "r+b") as null:
        keeper.go(command, stdio=[null.fileno()] * 3)
    assert keeper.until("Y", 0)[4:] == frames.encode_u32(error) + b"exec"
    assert keeper.over(5) == 125


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_reaches_the_agent(keeper: Keeper, number: int) -> None:
    """A signal for the agent's group ends it: 128+n."""
    pipes = started(keeper, "/bin/sleep", "60")
    keeper.channel.send("S", bytes([number]))
    assert keeper.ended() == 128 + number
    pipes.close()


def test_the_agent_stops_and_goes_on(keeper: Keeper) -> None:
    """Stopped by the broker it does nothing until it is continued; a stop of its own is told."""
    pipes = started(keeper, "/bin/sh", "-c", "while read line; do echo $line; kill -STOP $$; done")
    os.write(pipes.given, b"one\n")
    keeper.until("Z", 0)
    os.write(pipes.given, b"two\n")
    assert os.read(pipes.out, 100) == b"one\n"
    keeper.channel.send("S", bytes([signal.SIGCONT]))
    assert os.read(pipes.out, 100) == b"two\n"
    pipes.close()


def test_half_closed_input_is_the_end_of_input(keeper: Keeper) -> None:
    """The caller's end of input is the command's, while its output goes on."""
    pipes = started(keeper, "/bin/sh", "-c", "cat; echo after")
    os.write(pipes.given, b"before ")
    pipes.end("given")
    assert read_all(pipes.out) == b"before after\n"
    assert keeper.ended() == 0


def test_a_reader_that_leaves_is_told_to_the_writer(keeper: Keeper) -> None:
    """A command whose output nobody reads any more gets SIGPIPE, as in `yes | head -1`."""
    pipes = started(keeper, "/usr/bin/yes")
    assert os.read(pipes.out, 2) == b"y\n"
    pipes.end("out")
    assert keeper.ended() == 128 + signal.SIGPIPE


def test_fifty_megabytes_come_through_whole_both_ways(keeper: Keeper) -> None:
    """Bulk in and out at the same time arrives complete and in order."""
    data = os.urandom(50 * MIB)
    pipes = started(keeper, "/bin/cat")

    def feed() -> None:
        at = memoryview(data)
        while at:
            at = at[os.write(pipes.given, at) :]
        pipes.end("given")

    feeder = threading.Thread(target=feed)
    feeder.start()
    digest = hashlib.sha256(read_all(pipes.out)).digest()
    feeder.join()
    assert digest == hashlib.sha256(data).digest()
    assert keeper.ended() == 0


def test_everything_written_is_there_before_the_end_is_told(keeper: Keeper) -> None:
    """Output into a file is complete when the exit code comes, also more than fits into the link at once."""
    status, out, _ = keeper.run("/usr/bin/head", "-c", str(20 * MIB), "/dev/zero", timeout_s=30)
    assert (status, len(out)) == (0, 20 * MIB)


def test_a_caller_that_reads_nothing_holds_up_its_own_command_only(keeper: Keeper) -> None:
    """A full pipe stops its writer; another command answers at once, and memory does not grow."""
    pipes = started(keeper, "/usr/bin/yes")
    time.sleep(0.5)
    before = _resident(keeper)
    with subprocess_pipes(keeper, 1, "/bin/echo", "here") as other:
        assert os.read(other.out, 100) == b"here\n"
        assert keeper.ended(1) == 0
    time.sleep(0.5)
    assert _resident(keeper) - before < 2 * MIB
    pipes.close()


def _resident(keeper: Keeper) -> int:
    with open(f"/proc/{keeper.pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


@contextlib.contextmanager
def subprocess_pipes(keeper: Keeper, number: int, *command: str) -> Iterator[Pipes]:
    """Start one more command on pipes."""
    pipes = Pipes()
    keeper.execute(number, *command, stdio=pipes.theirs)
    pipes.handed_over()
    yield pipes
    pipes.close()


def test_sixty_four_commands_at_once_do_not_mix(keeper: Keeper) -> None:
    """Each of many commands gets its own input, output and exit code."""
    agent = started(keeper, "/bin/sleep", "60")
    with contextlib.ExitStack() as stack:
        all_pipes = {}
        for number in range(1, 65):
            script = f"cat; exit {number}"
            all_pipes[number] = stack.enter_context(subprocess_pipes(keeper, number, "/bin/sh", "-c", script))
        for number, pipes in all_pipes.items():
            os.write(pipes.given, b"%d " % number * 100)
            pipes.end("given")
        for number, pipes in all_pipes.items():
            assert read_all(pipes.out) == b"%d " % number * 100
            assert keeper.ended(number) == number
    agent.close()


def test_the_end_of_the_agent_ends_every_other_command(keeper: Keeper) -> None:
    """When the agent has ended nothing of the run lives on, and the guest was unmounted before that was told."""
    agent = started(keeper, "/bin/cat")
    with subprocess_pipes(keeper, 1, "/bin/sh", "-c", "trap '' TERM; sleep 60") as other:
        keeper.until("R", 1)
        agent.end("given")
        assert keeper.ended() == 0
        assert read_all(other.out) == b""
    assert "unmounted" in keeper.said()
    assert keeper.over(5) == 0


def test_descriptors_may_be_of_any_kind(keeper: Keeper) -> None:
    """A file, /dev/null, a socket and a pipe are as good as each other for a command's standard streams."""
    agent = started(keeper, "/bin/sleep", "60")
    path = keeper.place.work / "out"
    with path.open("wb") as file, open(os.devnull, "r+b") as null:
        keeper.execute(1, "/bin/sh", "-c", "cat; echo to the file", stdio=[null.fileno(), file.fileno(), null.fileno()])
    assert keeper.ended(1) == 0
    assert path.read_bytes() == b"to the file\n"
    agent.close()


def test_the_callers_standard_output_stays_as_it_was(keeper: Keeper) -> None:
    """O_NONBLOCK on a caller's descriptor would reach his shell: it is not set."""
    keeper.begin()
    pipes = Pipes()
    keeper.go("/bin/echo", "hi", stdio=pipes.theirs)
    assert keeper.ended() == 0
    assert all(os.get_blocking(fd) for fd in pipes.theirs)
    pipes.handed_over()
    pipes.close()


def test_words_larger_than_a_guests_frame_go_in(keeper: Keeper) -> None:
    """A command line may be as long as anywhere else: the bound on frames is for what a guest sends."""
    status, out, _ = keeper.run("/bin/sh", "-c", "for word; do length=$((length + ${#word})); done; echo $length", "sh",
                                *["x" * 100_000] * 5)  # fmt: skip
    assert (status, out) == (0, b"500000\n")


def test_the_fields_and_the_files_of_a_run_arrive_whole(keeper: Keeper) -> None:
    """`B` brings what the plan says and, fresh from the keeper, entropy and the time; the tar comes bit by bit."""
    tar = os.urandom(3 * MIB)
    keeper.begin("hostname=guest", tar=tar)
    with (keeper.place.work / "seen").open("w+b") as out, open(os.devnull, "r+b") as null:
        script = "sha256sum </run/cloister/carried; cat /run/cloister/fields"
        keeper.go("/bin/sh", "-c", script, stdio=[null.fileno(), out.fileno(), out.fileno()])
        assert keeper.ended() == 0
        out.seek(0)
        digest, *fields = out.read().decode().splitlines()
    assert digest.split()[0] == hashlib.sha256(tar).hexdigest()
    words = dict(field.split("=", 1) for field in fields)
    assert words["hostname"] == "guest"
    assert len(words["entropy"]) == 128
    assert abs(int(words["time_ns"]) / 1e9 - time.time()) < 60
    before = os.umask(0)
    os.umask(before)
    assert words["umask"] == f"{before:03o}"


def test_a_begin_that_fails_is_told_as_such(keeper: Keeper) -> None:
    """Where the guest cannot become the run's place nothing runs: `Y` 0 with the error, and no probe."""
    keeper.send_begin("hostname=refused")
    assert keeper.until("Y", 0)[4:] == frames.encode_u32(22) + b"begin"
    assert not [frame for frame in keeper.seen if frame.kind == "P"]
    assert keeper.over(5) == 125


def test_figures_are_told_when_they_are_asked_for(keeper: Keeper) -> None:
    """`T` is answered with memory, load, processes and disks as the guest's kernel has them."""
    pipes = started(keeper, "/bin/sleep", "60")
    keeper.channel.send("T")
    words = dict(item.decode().split("=") for item in frames.decode_list(keeper.until("T"))[0])
    assert int(words["memory_total"]) > int(words["memory_available"]) > 0
    pipes.close()


def test_a_guest_that_holds_still_says_so_and_goes_on_later(keeper: Keeper) -> None:
    """After `Q` nothing moves until it is told to go on; then nothing is lost."""
    pipes = started(keeper, "/bin/cat")
    keeper.channel.send("Q")
    assert keeper.until("Q") == b""
    os.write(pipes.given, b"meanwhile")
    time.sleep(0.3)
    os.set_blocking(pipes.out, False)
    with pytest.raises(BlockingIOError):
        os.read(pipes.out, 100)
    keeper.channel.send("Q", b"\0")
    os.set_blocking(pipes.out, True)
    assert os.read(pipes.out, 100) == b"meanwhile"
    pipes.close()


def test_output_of_what_outlives_its_command_still_comes(keeper: Keeper) -> None:
    """A command in the background keeps its caller's output, and the exit code does not wait for it."""
    agent = started(keeper, "/bin/sleep", "60")
    with subprocess_pipes(keeper, 1, "/bin/sh", "-c", "(sleep 0.5; echo late) & echo first") as other:
        assert keeper.ended(1) == 0
        assert read_all(other.out) == b"first\nlate\n"
    agent.close()


def test_what_floods_in_the_background_does_not_hold_up_the_exit_code(keeper: Keeper) -> None:
    """A command that leaves an endless writer behind has ended all the same, also for a slow reader."""
    agent = started(keeper, "/bin/sleep", "60")
    with subprocess_pipes(keeper, 1, "/bin/sh", "-c", "yes & echo first; exit 4") as other:
        time.sleep(0.5)
        seen = b""
        while len(seen) < 2 * MIB:
            seen += os.read(other.out, 4096)
        assert b"first\n" in seen
        assert keeper.ended(1) == 4
    agent.close()


def test_commands_fail_when_there_are_too_many(keeper: Keeper) -> None:
    """More than 256 at once are refused one by one; the run goes on."""
    agent = started(keeper, "/bin/sleep", "60")
    with open(os.devnull, "r+b") as null:
        for number in range(1, 260):
            keeper.execute(number, "/bin/sleep", "30", stdio=[null.fileno()] * 3)
    failed = [keeper.until("Y") for _ in range(4)]
    assert {payload[8:] for payload in failed} == {b"fork"}
    keeper.channel.send("S", bytes([signal.SIGTERM]))
    assert keeper.ended() == 128 + signal.SIGTERM
    agent.close()


def test_nothing_is_left_of_a_run(keeper: Keeper) -> None:
    """Monitor, guest and every command are gone when the keeper is."""
    keeper.run("/bin/sh", "-c", "setsid sleep 61.7182 & exit 0")
    keeper.over(5)
    assert subprocess.run(["pgrep", "-f", "sleep 61.7182"], check=False, capture_output=True).stdout == b""


def test_one_file_for_both_outputs_keeps_their_order(keeper: Keeper) -> None:
    """As after `>log 2>&1`: what is written to the one and to the other is there in the order of writing."""
    keeper.begin()
    script = "for i in 1 2 3 4 5 6 7 8 9; do echo out $i; echo err $i >&2; done"
    with (keeper.place.work / "log").open("w+b") as log, open(os.devnull, "r+b") as null:
        keeper.go("/bin/sh", "-c", script, stdio=[null.fileno(), log.fileno(), log.fileno()])
        assert keeper.ended() == 0
        log.seek(0)
        assert log.read() == b"".join(b"out %d\nerr %d\n" % (number, number) for number in range(1, 10))
