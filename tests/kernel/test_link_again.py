"""A guest that was kept is met again by its own keeper, over another connection: what goes on, and what ends it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from again_rig import Answer, Vsock, frame
from fake_guest import Fake, stream_of, u32
from keeper_rig import PTY, Keeper, Place, place_of_test
from test_link_adoption import COUNT, read_up_to
from test_link_commands import Pipes
from test_link_terminals import Terminal

from cloister.host import frames
from cloister.host.vm_link import PROTOCOL

pytestmark = pytest.mark.kernel
place = pytest.fixture(place_of_test)
STDOUT = stream_of(0, 1)
TICKS = "i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo $i; [ $((i % 40)) = 0 ] && sleep 0.02; done; echo end"


@pytest.fixture
def vsock(place: Place) -> Iterator[Vsock]:
    """A guest without a keeper, behind a vsock."""
    made = Vsock(place)
    yield made
    made.close()


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    """Of one command."""
    made = Pipes()
    yield made
    made.close()


def agent(keeper: Keeper, pipes: Pipes, *command: str) -> None:
    """Start the agent."""
    keeper.until("P")
    keeper.go(*command, stdio=pipes.theirs)
    pipes.handed_over()
    keeper.until("R", 0)


def kept(vsock: Vsock, keeper: Keeper, ends: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Do what keeping a machine does to its link."""
    keeper.channel.send("Q")
    assert keeper.until("Q") == b""
    vsock.cut(ends)
    meanwhile()
    keeper.channel.send("Q", b"\0")


@pytest.mark.parametrize("ends", ["none", "guest", "keeper", "both"])
def test_a_run_goes_on_over_another_connection(vsock: Vsock, pipes: Pipes, ends: str) -> None:
    """Whatever its monitor did to the first one. What is typed, asked for and started meanwhile comes behind it."""
    keeper = vsock.keeper()
    try:
        agent(keeper, pipes, "/bin/sh", "-c", COUNT)
        os.write(pipes.given, b"a\n")
        assert os.read(pipes.out, 100) == b"1 a\n"
        keeper.execute(1, "/bin/sh", "-c", 'read a; echo "<$a>"; read b; echo "<$b>"; exit 3', flags=PTY)
        terminal = Terminal(keeper, 1)
        terminal.type(b"one\n")
        terminal.until(b"<one>")
        more = Pipes()

        def meanwhile() -> None:
            os.write(pipes.given, b"b\n")
            terminal.type(b"two\n")
            keeper.channel.send("T")
            keeper.execute(2, "/bin/sh", "-c", "echo started", stdio=more.theirs)
            more.handed_over()
            time.sleep(0.3)
            assert not select.select([pipes.out, more.out], [], [], 0)[0]

        kept(vsock, keeper, ends, meanwhile)
        terminal.until(b"<two>")
        assert keeper.ended(1) == 3
        assert os.read(pipes.out, 100) == b"2 b\n"
        assert keeper.ended(2) == 0
        assert os.read(more.out, 100) == b"started\n"
        keeper.until("T")
        pipes.end("given")
        assert keeper.ended() == 0
        assert os.read(pipes.out, 100) == b"end\n"
        assert vsock.calls == 2
        assert vsock.said().count("time set") == 1
        assert [one.kind for one in keeper.seen if one.kind in "HPYD"] == ["H"], "one session"
        more.close()
        terminal.close()
    finally:
        keeper.close()


def test_nothing_is_lost_or_comes_twice(vsock: Vsock, pipes: Pipes) -> None:
    """An agent that writes without end is kept five times, with a connection that is cut anywhere else each time."""
    keeper = vsock.keeper()
    text = b""
    try:
        agent(keeper, pipes, "/bin/sh", "-c", TICKS)
        for ends in ("guest", "keeper", "both", "none", "guest"):
            text += os.read(pipes.out, 1 << 16)
            kept(vsock, keeper, ends)
        text += read_up_to(pipes.out, b"end\n")
        assert text.split() == [b"%d" % number for number in range(1, 4001)] + [b"end"]
        assert keeper.ended() == 0
        assert vsock.calls == 6
    finally:
        keeper.close()


def test_a_guest_that_forgets_late_is_called_again(vsock: Vsock, pipes: Pipes) -> None:
    """A guest's kernel may hear of the reset behind the new connection: then it is cut as well, and there is a third.

    The same at a start: of a guest that was restored.
    """
    vsock.forgets = 2
    keeper = vsock.keeper()
    try:
        agent(keeper, pipes, "/bin/sh", "-c", COUNT)
        assert vsock.calls == 3
        vsock.forgets = 4
        kept(vsock, keeper, "guest")
        os.write(pipes.given, b"a\n")
        assert os.read(pipes.out, 100) == b"1 a\n"
        assert vsock.calls == 8
    finally:
        keeper.close()


def test_a_guest_that_moves_is_not_met_again(vsock: Vsock, pipes: Pipes) -> None:
    """A connection that ends before the question, or behind the word to go on, ends the run, as ever."""
    keeper = vsock.keeper()
    try:
        agent(keeper, pipes, "/bin/sh", "-c", COUNT)
        kept(vsock, keeper, "both")
        os.write(pipes.given, b"a\n")
        assert os.read(pipes.out, 100) == b"1 a\n"
        vsock.cut("both")
        assert keeper.died()["reason"] == "guest-ended"
        assert keeper.ended() == 137
        assert vsock.calls == 2
    finally:
        keeper.close()


def test_another_connection_to_a_guest_that_moves_is_closed(vsock: Vsock, pipes: Pipes) -> None:
    """Nobody takes a run from its keeper while it moves, by whatever word."""
    keeper = vsock.keeper()
    try:
        agent(keeper, pipes, "/bin/sh", "-c", COUNT)
        for word in (frame("I", bytes(16)), frame("J", u32(PROTOCOL) + bytes(16))):
            with vsock.dial() as other:
                with contextlib.suppress(BrokenPipeError):
                    other.sendall(word)
                assert ended(other)
        os.write(pipes.given, b"a\n")
        assert os.read(pipes.out, 100) == b"1 a\n"
    finally:
        keeper.close()


def ended(link: socket.socket) -> bool:
    """Whether a connection is over, and nothing came by it."""
    try:
        return link.recv(1) == b""
    except ConnectionError:
        return True


def test_a_guest_that_stands_still_knows_its_session(vsock: Vsock, pipes: Pipes) -> None:
    """A stranger's nonce, or other words, lead to nothing: its own keeper is met behind them all the same."""
    keeper = vsock.keeper()
    try:
        agent(keeper, pipes, "/bin/sh", "-c", COUNT)

        def strangers() -> None:
            for word in (frame("I", bytes(16)), frame("I", b"x"), frame("I")):
                with vsock.dial() as other:
                    other.sendall(word)
                    assert ended(other)
            with vsock.dial() as other:
                other.sendall(frame("Q", bytes(9)) + frame("S", b"\x0f") + frame("K"))
                assert not select.select([other], [], [], 0.5)[0]

        kept(vsock, keeper, "both", strangers)
        os.write(pipes.given, b"a\n")
        assert os.read(pipes.out, 100) == b"1 a\n"
        assert "unmounted" not in vsock.said()
    finally:
        keeper.close()


def test_another_keeper_joins_a_guest_that_was_kept(vsock: Vsock, pipes: Pipes) -> None:
    """As after a restore, over a new connection, or the next one: its former session is over. It is kept again."""
    first = vsock.keeper()
    agent(first, pipes, "/bin/sh", "-c", COUNT)
    first.channel.send("Q")
    first.until("Q")
    vsock.cut("both")
    first.close()
    vsock.forgets = 1
    second = vsock.keeper("--adopt", "0")
    theirs = Pipes()
    try:
        assert b"commands=0" in frames.decode_list(second.until("H"))[0]
        second.until("P")
        second.channel.send("G", u32(2), theirs.theirs)
        theirs.handed_over()
        second.until("R", 0)
        os.write(theirs.given, b"b\n")
        assert os.read(theirs.out, 100) == b"1 b\n"
        kept(vsock, second, "guest")
        os.write(theirs.given, b"c\n")
        assert os.read(theirs.out, 100) == b"2 c\n"
    finally:
        theirs.close()
        second.close()


@pytest.mark.parametrize("answer", ["refuse", "silence", "nobody"])
def test_a_guest_that_is_not_met_again_ends_the_run(vsock: Vsock, pipes: Pipes, answer: Answer) -> None:
    """Within the keeper's patience, and it is said why; nothing hangs."""
    keeper = vsock.keeper("--patience", "2")
    try:
        agent(keeper, pipes, "/bin/sh", "-c", COUNT)
        vsock.answer = answer
        began = time.monotonic()
        kept(vsock, keeper, "both")
        died = keeper.died()
        assert died["reason"] == "guest-silent"
        assert "could not be met again within 2 s" in died["text"]
        assert keeper.ended() == 137
        assert 1.5 < time.monotonic() - began < 6
        assert vsock.calls >= (1 if answer == "nobody" else 3)
    finally:
        keeper.close()


def test_a_kill_ends_a_run_that_is_not_met_again(vsock: Vsock, pipes: Pipes) -> None:
    """Whoever ends it does not wait for the guest longer than for any other."""
    keeper = vsock.keeper()
    try:
        agent(keeper, pipes, "/bin/sh", "-c", COUNT)
        vsock.answer = "silence"
        kept(vsock, keeper, "both")
        began = time.monotonic()
        keeper.channel.send("K")
        assert keeper.over(6) == 137
        assert time.monotonic() - began < 4
    finally:
        keeper.close()


# --- what a guest that was taken over may say on the new connection


@pytest.fixture
def fake(place: Place, pipes: Pipes) -> Iterator[Fake]:
    """A keeper with a running agent, whose guest is the test."""
    made = Fake(place, "--patience", "3")
    made.running(pipes.theirs)
    pipes.handed_over()
    yield made
    made.close()


def stands(fake: Fake) -> None:
    """Bring it to where its machine may be kept."""
    fake.keeper.channel.send("Q")
    assert fake.guest.until("Q") == b""
    fake.guest.send("Q")
    assert fake.keeper.until("Q") == b""


def called(fake: Fake) -> None:
    """Have it go on, and take its new connection."""
    stands(fake)
    fake.keeper.channel.send("Q", b"\0")
    fake.met()
    assert fake.guest.receive() == ("I", fake.guest.nonce)


def test_an_honest_guest_is_met_again(fake: Fake, pipes: Pipes) -> None:
    """The twin of all that follows: the session's nonce alone is said before the answer, then all that waited.

    The old connection is closed first, whatever the monitor did to it.
    """
    stands(fake)
    old = fake.guest.connection.dup()
    fake.keeper.channel.send("T")
    os.write(pipes.given, b"typed meanwhile")
    fake.keeper.channel.send("Q", b"\0")
    fake.met()
    assert ended(old)
    old.close()
    assert fake.guest.receive() == ("I", fake.guest.nonce)
    assert not select.select([fake.guest.connection], [], [], 0.5)[0]
    before = time.time_ns()
    fake.guest.send("I", fake.guest.nonce)
    assert fake.guest.receive() == ("T", b"")
    kind, payload = fake.guest.receive()
    assert (kind, payload[:1]) == ("Q", b"\0")
    assert before <= int.from_bytes(payload[1:], "little") <= time.time_ns()
    assert fake.guest.until("D") == u32(stream_of(0, 0)) + b"typed meanwhile"
    fake.guest.send("T", frames.encode_list([b"late=1"]))
    fake.keeper.until("T")
    fake.guest.send("D", u32(STDOUT) + b"output")
    assert os.read(pipes.out, 100) == b"output"
    fake.fine()


SAID = {
    "nothing of its nonce": lambda g: g.send("I"),
    "another nonce": lambda g: g.send("I", bytes(16)),
    "too much of it": lambda g: g.send("I", g.nonce + b"\0"),
    "a hello": lambda g: g.send("H", u32(PROTOCOL) + g.nonce + frames.encode_list([b"kernel=6.1"])),
    "output": lambda g: g.send("D", u32(STDOUT) + b"x"),
    "an end": lambda g: g.send("E", u32(0) + b"\0"),
    "a rest": lambda g: g.send("Q"),
    "a connection": lambda g: g.send("O", u32(1) + b"\1egress.sock"),
    "the rest of a frame that it had begun": lambda g: g.raw(b"\0" * 40),
    "its nonce a second time": lambda g: [g.send("I", g.nonce), g.send("I", g.nonce)],
}


@pytest.mark.parametrize("what", SAID)
def test_the_first_word_of_a_guest_is_its_sessions(fake: Fake, what: str) -> None:
    """Anything else, or anything before it, ends the machine."""
    called(fake)
    SAID[what](fake.guest)
    fake.refused()


def test_a_frame_that_is_too_long_ends_it_there_too(fake: Fake) -> None:
    """It is no connection that was cut."""
    called(fake)
    fake.guest.raw(b"\xff\xff\xff\x7fI")
    assert fake.keeper.died()["reason"] == "guest-ended"


def test_a_guest_that_stands_still_may_not_break_the_rules(fake: Fake) -> None:
    """What ends a machine that moves ends one that stands; its connection may be cut, and nothing else."""
    stands(fake)
    fake.guest.raw(b"\xff\xff\xff\x7fD")
    assert fake.keeper.died()["reason"] == "guest-ended"


def test_what_came_in_part_is_void(fake: Fake, pipes: Pipes) -> None:
    """Half a frame by the old connection is no beginning of what comes by the new one."""
    stands(fake)
    fake.guest.raw(frame("D", u32(STDOUT) + b"half a word")[:-4])
    time.sleep(0.2)
    fake.keeper.channel.send("Q", b"\0")
    fake.met_again()
    fake.guest.until("Q")
    fake.guest.send("D", u32(STDOUT) + b"whole")
    assert os.read(pipes.out, 100) == b"whole"


def test_a_guest_that_cuts_every_connection_has_its_time(fake: Fake) -> None:
    """It may not hold up the end by answering calls and hanging up."""
    began = time.monotonic()
    called(fake)
    fake.guest.connection.close()
    fake.listener.settimeout(0.5)
    with contextlib.suppress(TimeoutError, AssertionError):
        while time.monotonic() - began < 10:
            with fake.knocked() as connection:
                connection.sendall(b"OK 5\n")
                ended(connection)
    assert fake.keeper.died()["reason"] == "guest-silent"
    assert time.monotonic() - began < 6


def test_a_guest_that_answers_too_early_is_a_liar(fake: Fake, pipes: Pipes) -> None:
    """Before it can have read the question: the keeper would take half of a frame for all that was sent."""
    os.write(pipes.given, bytes(1 << 16))
    for number in range(1, 6):  # more than the socket takes, as long as nobody reads
        theirs = Pipes()
        fake.keeper.execute(number, *["x" * 100_000], stdio=theirs.theirs)
        theirs.close()
    fake.keeper.channel.send("Q")
    for _ in range(10):
        fake.keeper.take()  # our own end has a queue as well
    time.sleep(0.5)
    fake.guest.send("Q")
    fake.refused("a rest before it was asked for")


def test_a_question_meanwhile_is_asked_behind_it(fake: Fake) -> None:
    """The broker keeps the machine again before it was met: it goes on, and is asked again. Or not, if taken back."""
    called(fake)
    fake.keeper.channel.send("Q")
    assert not select.select([fake.guest.connection], [], [], 0.3)[0]
    fake.guest.send("I", fake.guest.nonce)
    assert fake.guest.until("Q")[:1] == b"\0"
    assert fake.guest.until("Q") == b""
    fake.guest.send("Q")
    assert fake.keeper.until("Q") == b""
    fake.keeper.channel.send("Q", b"\0")
    fake.met()
    for payload in (b"", b"\0"):
        fake.keeper.channel.send("Q", payload)
    assert fake.guest.receive() == ("I", fake.guest.nonce)
    time.sleep(0.3)
    fake.guest.send("I", fake.guest.nonce)
    assert fake.guest.until("Q")[:1] == b"\0"
    fake.fine()


def test_a_guest_that_was_not_ready_goes_on_by_its_connection(fake: Fake) -> None:
    """The question is taken back before the answer: nothing was kept, and what is under way must not be cut off."""
    fake.keeper.channel.send("Q")
    fake.guest.until("Q")
    fake.keeper.channel.send("Q", b"\0")
    assert fake.guest.until("Q")[:1] == b"\0"
    fake.guest.send("Q")
    fake.fine()
    assert not select.select([fake.listener], [], [], 0)[0]
