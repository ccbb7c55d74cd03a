"""A guest that was kept comes to another keeper: who is told what, what goes on, and what ends it."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterator

import pytest
from fake_guest import WINDOW, Fake, FakeGuest, stream_of, u32
from keeper_rig import PTY, Keeper, Place, place_of_test
from kept_guest import Kept
from test_link_commands import Pipes
from test_link_terminals import Terminal

from cloister.host import frames

pytestmark = pytest.mark.kernel
place = pytest.fixture(place_of_test)
ADOPT = 2
STDIN, STDOUT, STDERR, TERMINAL = (stream_of(0, k) for k in range(4))
COUNT = 'i=0; while read line; do i=$((i+1)); echo "$i $line"; done; echo end'


@pytest.fixture
def kept(place: Place) -> Iterator[Kept]:
    """A guest without a keeper."""
    made = Kept(place)
    yield made
    made.close()


@pytest.fixture
def pipes() -> Iterator[Callable[[], Pipes]]:
    """Makes pipes, and closes them."""
    with contextlib.ExitStack() as stack:

        def make() -> Pipes:
            made = Pipes()
            stack.callback(made.close)
            return made

        yield make


def taken_over(keeper: Keeper, living: str) -> None:
    """Wait until the guest has its fresh things; it says who lives."""
    words = [item.decode() for item in frames.decode_list(keeper.until("H"))[0]]
    assert f"commands={living}" in words
    assert frames.decode_list(keeper.until("P"))[0] == [b"restored=renewed"]


def test_an_agent_goes_on_with_another_keeper(kept: Kept, pipes: Callable[[], Pipes]) -> None:
    """Its variables are what they were, its streams lead to the new caller; what others had started gets SIGHUP."""
    first = kept.keeper()
    first.until("P")
    ours, others, pids = pipes(), (pipes(), pipes()), []
    first.go("/bin/sh", "-c", COUNT, stdio=ours.theirs)
    ours.handed_over()
    os.write(ours.given, b"a\n")
    assert os.read(ours.out, 100) == b"1 a\n"
    for number, (other, trap) in enumerate(zip(others, (":", "trap '' HUP"), strict=True), 1):
        first.execute(number, "/bin/sh", "-c", f"{trap}; echo ready; while :; do sleep 0.05; done", stdio=other.theirs)
        other.handed_over()
        assert os.read(other.out, 100) == b"ready\n"
        pids.append(int.from_bytes(first.until("R", number)[4:], "little"))
    kept.leave(first)
    assert "still" in kept.said()

    second = kept.keeper("--adopt", "2")
    try:
        taken_over(second, "0,1,2")
        theirs = pipes()
        second.channel.send("G", u32(ADOPT), theirs.theirs)
        theirs.handed_over()
        second.until("R", 0)
        os.write(theirs.given, b"b\n")
        assert os.read(theirs.out, 100) == b"2 b\n"
        more = pipes()
        script = f"while kill -0 {pids[0]}; do sleep 0.05; done; sleep 0.2; kill -0 {pids[1]} && echo ignores it"
        second.execute(3, "/bin/sh", "-c", script, stdio=more.theirs)
        more.handed_over()
        assert second.ended(3) == 0
        assert os.read(more.out, 100) == b"ignores it\n"
        theirs.end("given")
        assert second.ended() == 0
        assert os.read(theirs.out, 100) == b"end\n"
        assert not [frame for frame in second.seen if frame.kind in "EYD"], "nobody was told of the old command"
    finally:
        second.close()


def test_what_the_agent_had_closed_is_closed_for_the_new_caller(kept: Kept, pipes: Callable[[], Pipes]) -> None:
    """An agent that has closed its output before it was kept: its new caller sees the end at once."""
    first = kept.keeper()
    first.until("P")
    ours = pipes()
    first.go("/bin/sh", "-c", "echo there; exec >&-; sleep 60", stdio=ours.theirs)
    ours.handed_over()
    assert os.read(ours.out, 100) == b"there\n"
    assert os.read(ours.out, 100) == b""
    kept.leave(first)
    second = kept.keeper("--adopt", "0")
    try:
        taken_over(second, "0")
        theirs = pipes()
        second.channel.send("G", u32(ADOPT), theirs.theirs)
        theirs.handed_over()
        second.until("R", 0)
        assert select.select([theirs.out], [], [], 10)[0]
        assert os.read(theirs.out, 100) == b""
    finally:
        second.close()


def test_an_agent_whose_output_and_errors_are_one_stays_so(kept: Kept, pipes: Callable[[], Pipes]) -> None:
    """Both came by one stream in the order in which they were written: for the new caller they do, in its output."""
    first = kept.keeper()
    first.until("P")
    ours = pipes()
    loop = "while read line; do echo out $line; echo err $line >&2; done"
    first.go("/bin/sh", "-c", loop, stdio=(ours.theirs[0], ours.theirs[1], ours.theirs[1]))
    ours.handed_over()
    os.write(ours.given, b"a\n")
    assert read_up_to(ours.out, b"err a\n") == b"out a\nerr a\n"
    kept.leave(first)
    second = kept.keeper("--adopt", "0")
    try:
        taken_over(second, "0")
        theirs = pipes()
        second.channel.send("G", u32(ADOPT), theirs.theirs)
        theirs.handed_over()
        second.until("R", 0)
        os.write(theirs.given, b"b\n")
        assert read_up_to(theirs.out, b"err b\n") == b"out b\nerr b\n", (second.said(), kept.said(), second.seen)
        assert select.select([theirs.err], [], [], 10)[0]
        assert os.read(theirs.err, 100) == b""
    finally:
        second.close()


def read_up_to(fd: int, end: bytes) -> bytes:
    """Read until what was read ends so, or until nothing more comes."""
    text = b""
    while not text.endswith(end) and select.select([fd], [], [], 20)[0] and (more := os.read(fd, 100)):
        text += more
    return text


def with_terminal(kept: Kept) -> None:
    """Start an agent that has made its terminal silent, and asks for a line."""
    first = kept.keeper()
    first.until("P")
    loop = 'while :; do read line && i=$((i+1)) && echo "$i $line"; done'
    script = f"trap 'stty size' WINCH; stty -echo; i=1; echo ready; {loop}"
    first.go("/bin/sh", "-c", script, flags=PTY)
    terminal = Terminal(first)
    terminal.until(b"ready")
    terminal.type(b"first\n")
    terminal.until(b"2 first")
    kept.leave(first)
    os.close(terminal.master)


def test_a_terminal_goes_on_as_its_agent_left_it(kept: Kept) -> None:
    """The agent's modes stay, the window is the new user's, and the agent hears of that."""
    with_terminal(kept)
    second = kept.keeper("--adopt", "0")
    try:
        taken_over(second, "0")
        second.channel.send("G", u32(ADOPT | PTY))
        terminal = Terminal(second, rows=33, columns=99)
        terminal.until(b"33 99")
        terminal.type(b"again\n")
        assert b"again" not in terminal.until(b"3 ")  # it had switched its echo off
        terminal.until(b"again")
    finally:
        second.close()


def test_an_agent_with_a_terminal_goes_on_without_a_user(kept: Kept, pipes: Callable[[], Pipes]) -> None:
    """What it writes to its terminal goes to the output of a run that nobody watches."""
    first = kept.keeper()
    first.until("P")
    first.go("/bin/sh", "-c", "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done", flags=PTY)
    terminal = Terminal(first)
    terminal.until(b"tick 2")
    kept.leave(first)
    os.close(terminal.master)
    second = kept.keeper("--adopt", "0")
    try:
        taken_over(second, "0")
        theirs = pipes()
        second.channel.send("G", u32(ADOPT | PTY), theirs.theirs)
        theirs.handed_over()
        second.until("R", 0)
        assert b"tick" in os.read(theirs.out, 100)
    finally:
        second.close()


def test_connections_that_were_open_end_and_new_ones_work(kept: Kept, pipes: Callable[[], Pipes]) -> None:
    """A connection to a socket of the box belongs to the run that is gone; the next one is served by this one."""
    first = kept.keeper()
    first.until("P")
    ours = pipes()
    script = (
        "import socket, sys\n"
        "def dial():\n"
        "    s = socket.socket(socket.AF_UNIX); s.settimeout(20)\n"
        "    s.connect('/run/cloister/box/egress.sock'); return s\n"
        "def echo(s, text):\n"
        "    s.sendall(text); return s.recv(100)\n"
        "old = dial(); print(echo(old, b'echo\\none'), flush=True); sys.stdin.readline()\n"
        "try:\n    print(echo(old, b'two'), flush=True)\n"
        "except OSError as error:\n    print('cut', flush=True)\n"
        "print(echo(dial(), b'echo\\nthree'), flush=True)\n"
    )
    first.go("/usr/bin/python3", "-I", "-c", script, stdio=ours.theirs)
    ours.handed_over()
    assert os.read(ours.out, 100) == b"b'one'\n"
    kept.leave(first)
    second = kept.keeper("--adopt", "0")
    try:
        taken_over(second, "0")
        theirs = pipes()
        second.channel.send("G", u32(ADOPT), theirs.theirs)
        theirs.handed_over()
        second.until("R", 0)
        os.write(theirs.given, b"go\n")
        assert second.ended() == 0
        assert os.read(theirs.out, 100) in {b"cut\nb'three'\n", b"b''\nb'three'\n"}
    finally:
        second.close()


# --- what a guest that was taken over may say


@pytest.fixture
def fake(place: Place) -> Iterator[Fake]:
    """A keeper that waits for a guest whose commands 0 and up to 3 were kept."""
    made = Fake(place, "--adopt", "3")
    yield made
    made.close()


def greeted(guest: FakeGuest, living: bytes = b"0,2") -> None:
    """Say hello, with these commands, take the fresh things and say so."""
    guest.joined([b"kernel=6.1", b"commands=" + living])
    guest.until("B")
    guest.until("F")
    guest.send("P", frames.encode_list([b"restored=renewed"]))


def adopted(fake: Fake, stdio: tuple[int, ...]) -> None:
    """Bring it to an agent that goes on."""
    greeted(fake.guest)
    fake.keeper.until("P")
    fake.keeper.channel.send("G", u32(ADOPT), stdio)
    assert fake.guest.until("G") == u32(ADOPT)
    fake.guest.send("R", u32(0, 42))
    fake.keeper.until("R", 0)


def test_an_honest_guest_is_adopted(fake: Fake, pipes: Callable[[], Pipes]) -> None:
    """The twin of all that follows."""
    ours = pipes()
    adopted(fake, ours.theirs)
    fake.guest.send("D", u32(STDOUT) + b"output")
    assert os.read(ours.out, 100) == b"output"
    fake.guest.send("D", u32(stream_of(2, 1)) + b"late words of a command that was left")
    fake.fine()
    fake.guest.send("E", u32(0) + b"\7")
    assert fake.keeper.ended() == 7


@pytest.mark.parametrize(
    "living", [b"", b"1,2", b"0,4", b"0,", b",0", b"0 ", b"x", b"-0", b"0,,2", b"0;2", b"0000000000", b"4294967296,0"]
)
def test_who_lives_must_be_who_was_kept(fake: Fake, living: bytes) -> None:
    """No agent, a command that never was, or no list of numbers: the machine ends."""
    fake.guest.joined([b"kernel=6.1", b"commands=" + living])
    fake.refused("kept")


def test_nobody_lives_in_a_guest_that_begins(place: Place) -> None:
    """A guest that boots, or comes from a template, has no commands: one that says so ends. Its twin: none, said."""
    fake = Fake(place)
    try:
        fake.guest.joined([b"commands=0"])
        fake.refused("before any was started")
    finally:
        fake.close()
    fake = Fake(place)
    try:
        fake.guest.joined([b"commands="])
        fake.guest.until("B")
    finally:
        fake.close()


EARLY = {
    "output": lambda g: g.send("D", u32(STDOUT) + b"x"),
    "an end of its output": lambda g: g.send("F", u32(STDOUT)),
    "credit for its input": lambda g: g.send("C", u32(STDIN, 1)),
    "its start": lambda g: g.send("R", u32(0, 42)),
    "its end": lambda g: g.send("E", u32(0) + b"\0"),
    "its stop": lambda g: g.send("Z", u32(0)),
    "the end of another that lives": lambda g: g.send("E", u32(2) + b"\0"),
    "a terminal": lambda g: g.send("M", u32(0)),
    "output of a terminal": lambda g: g.send("D", u32(TERMINAL) + b"x"),
}


@pytest.mark.parametrize("what", EARLY)
def test_an_agent_says_nothing_before_it_is_adopted(fake: Fake, what: str) -> None:
    """All that a command may say is refused as long as the keeper has not taken it over."""
    greeted(fake.guest)
    EARLY[what](fake.guest)
    fake.refused()


WRONG = {
    "a second start": lambda g: g.send("R", u32(0, 42)),
    "a start of another": lambda g: g.send("R", u32(2, 43)),
    "an end of another": lambda g: g.send("E", u32(2) + b"\0"),
    "a terminal it was not given": lambda g: g.send("M", u32(0)),
    "a failure to start": lambda g: g.send("Y", u32(0, 1) + b"adopt"),
    "data on its input": lambda g: g.send("D", u32(STDIN) + b"x"),
    "more than the window": lambda g: [
        g.send("D", u32(STDOUT) + bytes(1 << 16)) for _ in range(WINDOW // (1 << 16) * 3)
    ],
    "the streams of one that never was": lambda g: g.send("D", u32(stream_of(9, 1)) + b"x"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_adopted_agent_keeps_to_the_rules(fake: Fake, pipes: Callable[[], Pipes], what: str) -> None:
    """What ends a machine whose agent was started ends one whose agent goes on."""
    ours = pipes()
    adopted(fake, ours.theirs)
    WRONG[what](fake.guest)
    fake.refused()


@pytest.mark.parametrize("options", [(), ("--adopt", "3")])
def test_an_agent_is_started_or_adopted_as_the_plan_says(place: Place, options: tuple[str, ...]) -> None:
    """The broker's other order is refused too: no new agent beside one that lives, none adopted where none was kept."""
    fake = Fake(place, *options)
    try:
        if options:
            greeted(fake.guest)
        else:
            fake.guest.begun()
        fake.keeper.until("P")
        (theirs_in, given), (out, theirs_out) = os.pipe(), os.pipe()
        if options:
            fake.keeper.go("/bin/agent", stdio=(theirs_in, theirs_out, theirs_out))
        else:
            fake.keeper.channel.send("G", u32(ADOPT), (theirs_in, theirs_out, theirs_out))
        for fd in (theirs_in, given, out, theirs_out):
            os.close(fd)
        assert fake.keeper.over(5) == 125
    finally:
        fake.close()


# --- standing still


def test_nothing_leaves_for_a_guest_that_stands_still(fake: Fake, pipes: Callable[[], Pipes]) -> None:
    """Behind `Q` the keeper sends nothing, whatever is asked or comes: else a snapshot would hold half a frame."""
    ours = pipes()
    adopted(fake, ours.theirs)
    fake.keeper.channel.send("Q")
    assert fake.guest.until("Q") == b""
    for _ in range(3):
        fake.guest.send("D", u32(STDOUT) + bytes(1 << 16))
    os.set_blocking(ours.out, False)
    with contextlib.suppress(BlockingIOError):
        while os.read(ours.out, 1 << 16):
            time.sleep(0.05)
    fake.guest.send("Q")
    assert fake.keeper.until("Q") == b""
    fake.keeper.channel.send("T")
    os.write(ours.given, b"typed meanwhile")
    assert not select.select([fake.guest.connection], [], [], 1)[0]
    before = time.time_ns()
    fake.keeper.channel.send("Q", b"\0")
    fake.met_again()
    seen = []
    while not seen or seen[-1][0] != "Q":
        seen.append(fake.guest.receive())
    assert {kind for kind, _ in seen} == {"C", "T", "Q"}
    told = int.from_bytes(seen[-1][1][1:], "little")
    assert before <= told <= time.time_ns()
    assert fake.guest.until("D") == u32(STDIN) + b"typed meanwhile"


def test_an_answer_that_comes_late_harms_nobody(fake: Fake, pipes: Callable[[], Pipes]) -> None:
    """The broker has given up on it: the answer is dropped, and the next question has its own. A third one is a lie."""
    ours = pipes()
    adopted(fake, ours.theirs)
    for payload in (b"", b"\0", b""):
        fake.keeper.channel.send("Q", payload)
    fake.guest.until("Q"), fake.guest.until("Q"), fake.guest.until("Q")
    fake.guest.send("Q")
    fake.guest.send("Q")
    assert fake.keeper.until("Q") == b""
    assert not [frame for frame in fake.keeper.seen if frame.kind == "Q"]
    fake.keeper.channel.send("Q", b"\0")
    fake.met_again()
    fake.guest.until("Q")
    fake.fine()
    fake.guest.send("Q")
    fake.refused("a rest that was not asked for")


def test_a_kill_reaches_a_guest_that_stands_still(fake: Fake, pipes: Callable[[], Pipes]) -> None:
    """Whoever ends the run ends it also then."""
    ours = pipes()
    adopted(fake, ours.theirs)
    fake.keeper.channel.send("Q")
    fake.guest.until("Q")
    fake.keeper.channel.send("K")
    fake.guest.until("K")


@pytest.mark.parametrize("words", [("--adopt", "-1"), ("--adopt", "x"), ("--adopt", ""), ("--adopt", "536870912")])
def test_options_that_make_no_sense_are_refused(place: Place, words: tuple[str, ...]) -> None:
    """A number of a command, or nothing at all."""
    keeper = Keeper(place, *words, monitor=["/bin/true"])
    try:
        assert keeper.over(10) == 125
    finally:
        keeper.close()
