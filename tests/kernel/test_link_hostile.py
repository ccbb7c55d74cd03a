"""A guest that has been taken over speaks to the keeper: everything wrong ends its machine, with a reason."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from fake_guest import DATA_MAX, WINDOW, Fake, FakeGuest, resident, stream_of, u32, wait_for
from keeper_rig import PTY, Keeper, Place, place_of_test

from cloister.host import frames
from cloister.host.vm_link import PROTOCOL

pytestmark = pytest.mark.kernel
place = pytest.fixture(place_of_test)
STDIN, STDOUT, STDERR, TERMINAL = (stream_of(0, k) for k in range(4))
EGRESS = b"\1egress.sock"


def stall(guest: FakeGuest) -> None:
    """Have the relay keep its half of the connection open."""
    assert guest.until("C") == u32(1, WINDOW)
    guest.send("D", u32(1) + b"stall\n")


@pytest.fixture
def fake(place: Place) -> Iterator[Fake]:
    """A keeper with a fake guest that has said nothing yet."""
    made = Fake(place)
    yield made
    made.close()


@pytest.fixture
def running(fake: Fake) -> Iterator[Fake]:
    """The same, with an agent that runs on pipes; the caller's ends are closed at the end."""
    (theirs_in, given), (out, theirs_out) = os.pipe(), os.pipe()
    fake.running([theirs_in, theirs_out, theirs_out])
    for fd in (theirs_in, theirs_out):
        os.close(fd)
    fake.given, fake.out = given, out  # type: ignore[attr-defined]
    yield fake
    for fd in (given, out):
        os.close(fd)


def test_an_honest_guest_is_served(running: Fake) -> None:
    """The twin of all that follows: the same hands, and nothing wrong, is a run with an exit code."""
    running.guest.send("D", u32(STDOUT) + b"output")
    assert os.read(running.out, 100) == b"output"  # type: ignore[attr-defined]
    running.guest.send("O", u32(1) + EGRESS)
    assert running.guest.until("C") == u32(1, WINDOW)
    running.guest.send("D", u32(1) + b"echo\nhello")
    assert running.guest.until("D") == u32(1) + b"hello"
    running.fine()
    running.guest.send("E", u32(0) + b"\7")
    assert running.keeper.ended() == 7


def test_everything_before_the_answer_to_its_own_join_is_void(fake: Fake) -> None:
    """What a former session left in the stream is skipped, whatever it looks like."""
    join = fake.guest.until("J")
    fake.guest.raw(os.urandom(100_000) + struct.pack("<IB", 24, ord("H")) + u32(PROTOCOL) + bytes(16) + u32(0))
    fake.guest.raw(b"\xff" * 3 + join[4:12])
    fake.guest.nonce = join[4:]
    fake.guest.send("H", u32(PROTOCOL) + join[4:] + frames.encode_list([b"kernel=x"]))
    fake.guest.until("B")


def test_a_guest_that_never_says_hello_but_talks_is_ended(fake: Fake) -> None:
    """Bytes without end before the hello are bounded."""
    fake.guest.until("J")
    for _ in range(80):
        fake.guest.raw(bytes(1 << 16))
    died = fake.keeper.died()
    assert died["reason"] == "guest-ended"
    assert fake.keeper.over(5) == 125


BEFORE_AGENT = {
    "another version": lambda g: g.send("H", u32(PROTOCOL + 1) + g.until("J")[4:] + u32(0)),
    "a hello that is no list": lambda g: g.send("H", u32(PROTOCOL) + g.until("J")[4:] + u32(9)),
    "a hello with far too many words": lambda g: g.send("H", u32(PROTOCOL) + g.until("J")[4:] + u32(100) + bytes(400)),
    "a second hello": lambda g: (g.joined(), g.send("H", u32(PROTOCOL) + g.nonce + u32(0))),
    "findings twice": lambda g: (g.begun(), g.send("P", u32(0))),
    "findings that are no list": lambda g: (g.joined(), g.send("P", u32(7))),
    "a start that nobody asked for": lambda g: (g.begun(), g.send("R", u32(0, 1))),
    "an end that nobody asked for": lambda g: (g.begun(), g.send("E", u32(0) + b"\0")),
    "a terminal that nobody asked for": lambda g: (g.begun(), g.send("M", u32(0))),
    "figures that nobody asked for": lambda g: (g.begun(), g.send("T", u32(0))),
    "a rest that nobody asked for": lambda g: (g.begun(), g.send("Q")),
    "a failure of a command that never was": lambda g: (g.begun(), g.send("Y", u32(3, 2) + b"exec")),
    "a stage that is no word": lambda g: (g.begun(), g.send("Y", u32(0, 2) + b"exec\x1b[2J")),
    "output of a command that never was": lambda g: (g.begun(), g.send("D", u32(STDOUT) + b"x")),
}


@pytest.mark.parametrize("what", BEFORE_AGENT)
def test_what_no_guest_says_before_the_agent_ends_it(fake: Fake, what: str) -> None:
    """Each ends the monitor: `Y` 0 at the stage `monitor`, 125, and the reason."""
    BEFORE_AGENT[what](fake.guest)
    fake.refused()
    assert fake.keeper.until("Y", 0)[8:] == b"monitor"


WHILE_RUNNING = {
    "an unknown type": lambda g: g.send("?"),
    "a frame of the host's": lambda g: g.send("J", u32(PROTOCOL) + bytes(16)),
    "an order": lambda g: g.send("G", bytes(20)),
    "a type that is no letter": lambda g: g.raw(struct.pack("<IB", 0, 0)),
    "a frame too long": lambda g: g.raw(struct.pack("<IB", DATA_MAX + 65, ord("D"))),
    "a frame of four gigabytes": lambda g: g.raw(b"\xff\xff\xff\xffD"),
    "data without a number": lambda g: g.send("D", b"\1\2"),
    "empty data": lambda g: g.send("D", u32(STDOUT)),
    "data too long": lambda g: g.send("D", u32(STDOUT) + bytes(DATA_MAX + 60)),
    "data on standard input": lambda g: g.send("D", u32(STDIN) + b"x"),
    "data of another command": lambda g: g.send("D", u32(stream_of(9, 1)) + b"x"),
    "data of a stream that never was": lambda g: g.send("D", u32(99) + b"x"),
    "data of the host's stream that never was": lambda g: g.send("D", u32(16) + b"x"),
    "data after its end": lambda g: (g.send("F", u32(STDOUT)), g.send("F", u32(STDERR)), g.send("O", u32(1) + EGRESS),
                                     stall(g), g.send("F", u32(1)), g.send("D", u32(1) + b"x")),
    "an end twice": lambda g: (g.send("O", u32(1) + EGRESS), stall(g), g.send("F", u32(1)), g.send("F", u32(1))),
    "an end with more behind it": lambda g: g.send("F", u32(STDOUT, 1)),
    "credit for what it sends itself": lambda g: g.send("C", u32(STDOUT, 1)),
    "credit of nothing": lambda g: g.send("C", u32(STDIN, 0)),
    "credit beyond the window": lambda g: g.send("C", u32(STDIN, 1)),
    "credit that overflows": lambda g: g.send("C", u32(STDIN, 0xFFFF_FFFF)),
    "credit without a number": lambda g: g.send("C", u32(STDIN)),
    "an abort without an error": lambda g: g.send("A", u32(STDOUT)),
    "a socket by another name": lambda g: g.send("O", u32(1) + b"\1other.sock"),
    "a path out of the box": lambda g: g.send("O", u32(1) + b"\1../../egress.sock"),
    "a name with a NUL": lambda g: g.send("O", u32(1) + EGRESS + b"\0"),
    "no name": lambda g: g.send("O", u32(1) + b"\1"),
    "a port of the host's": lambda g: g.send("O", u32(1) + b"\x0222"),
    "an even number": lambda g: g.send("O", u32(2) + EGRESS),
    "the number of a command": lambda g: g.send("O", u32(stream_of(0, 1)) + EGRESS),
    "a number twice": lambda g: (g.send("O", u32(1) + EGRESS), g.send("O", u32(1) + EGRESS)),
    "a smaller number": lambda g: (g.send("O", u32(5) + EGRESS), g.send("O", u32(3) + EGRESS)),
    "a start twice": lambda g: g.send("R", u32(0, 42)),
    "a start of another": lambda g: g.send("R", u32(1, 42)),
    "a stop of another": lambda g: g.send("Z", u32(7)),
    "a stop with more behind it": lambda g: g.send("Z", u32(0, 0)),
    "a failure after its start": lambda g: g.send("Y", u32(0, 2) + b"exec"),
    "an end of another": lambda g: g.send("E", u32(3) + b"\0"),
    "an end without a status": lambda g: g.send("E", u32(0)),
    "a terminal for pipes": lambda g: g.send("M", u32(0)),
    "an event that is no list": lambda g: g.send("L", u32(3)),
    "an event of too many words": lambda g: g.send("L", u32(65) + bytes(260)),
    "an event with a NUL": lambda g: g.send("L", u32(1, 3) + b"a\0b"),
    "a notice too long": lambda g: g.send("N", bytes(16 * 1024 + 1)),
}  # fmt: skip


@pytest.mark.parametrize("what", WHILE_RUNNING)
def test_what_no_guest_says_beside_its_agent_ends_it(running: Fake, what: str) -> None:
    """Each ends the monitor: `E` 0 with 137, and the reason."""
    WHILE_RUNNING[what](running.guest)
    died = running.keeper.died()
    assert died["reason"] in {"guest-protocol", "guest-ended"}, died
    assert running.keeper.ended() == 137
    assert running.keeper.over(5) == 137


def test_more_than_its_credit_ends_it(place: Place) -> None:
    """A reader that has stopped: what was granted is taken and kept, one byte more ends the machine."""
    fake = Fake(place)
    reader, writer = socket.socketpair()
    writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    fake.running([writer.fileno()] * 3)
    writer.close()
    for _ in range(WINDOW // DATA_MAX):
        fake.guest.send("D", u32(STDOUT) + bytes(DATA_MAX))
    fake.fine()
    granted = 0
    fake.guest.connection.settimeout(0.3)
    try:
        while True:
            kind, payload = fake.guest.receive()
            granted += struct.unpack("<II", payload)[1] if kind == "C" else 0
    except TimeoutError:
        pass
    assert granted < WINDOW
    fake.guest.connection.settimeout(10)
    for _ in range(granted // DATA_MAX):
        fake.guest.send("D", u32(STDOUT) + bytes(DATA_MAX))
    fake.guest.send("D", u32(STDOUT) + bytes(granted % DATA_MAX + 1))
    fake.refused("breaks its rules")
    reader.close()
    fake.close()


def test_late_frames_of_an_ended_stream_are_forgiven(running: Fake) -> None:
    """Frames cross: what comes for a stream that has just been cut is dropped, the run goes on."""
    running.guest.send("A", u32(STDOUT, 32))
    for kind, payload in [("D", b"late"), ("C", u32(5)), ("F", b""), ("A", u32(1))]:
        running.guest.send(kind, u32(STDOUT) + payload)
    running.fine()


def test_thousands_of_streams_cost_nothing(running: Fake) -> None:
    """Ten thousand connections opened: those beyond the bound are refused, memory and descriptors stay few."""
    before = resident(running.keeper)
    for number in range(10_000):
        running.guest.send("O", u32(2 * number + 1) + EGRESS)
        if number % 500 == 0:
            _drop_answers(running)
    assert _descriptors(running) <= 1024
    assert resident(running.keeper) - before < 8 << 20
    _drop_answers(running)
    running.fine()


def _drop_answers(fake: Fake) -> None:
    fake.guest.connection.setblocking(False)
    try:
        while fake.guest.connection.recv(1 << 20):
            pass
    except BlockingIOError:
        pass
    fake.guest.connection.settimeout(10)


def _descriptors(fake: Fake) -> int:
    """Return the size of its table of descriptors: the table itself is closed to its user, as its memory is."""
    with open(f"/proc/{fake.keeper.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("FDSize"))


def test_a_guest_that_reads_nothing_stops_being_read(running: Fake) -> None:
    """It provokes answers and takes none: the keeper stops reading it, holds little, and still obeys the broker."""
    before = resident(running.keeper)
    running.guest.connection.settimeout(1)
    sent = 0
    try:
        for number in range(2_000_000):
            running.guest.connection.sendall(struct.pack("<IB", 16, ord("O")) + u32(2 * number + 1) + EGRESS)
            sent += 1
    except TimeoutError:
        pass
    assert 0 < sent < 2_000_000
    assert resident(running.keeper) - before < 16 << 20
    running.keeper.channel.send("K")
    assert running.keeper.over(5) == 137


def test_events_are_counted_and_limited(running: Fake) -> None:
    """A flood of events reaches the broker as a few and a count: nobody's log is filled."""
    for number in range(5000):
        running.guest.send("L", frames.encode_list([b"event=%d" % number]))
    time.sleep(1.1)
    running.guest.send("L", frames.encode_list([b"event=last"]))
    end = time.monotonic() + 10
    while not any(b"event=last" in frame.payload for frame in running.keeper.seen):
        assert time.monotonic() < end
        running.keeper.take()
    events = [frame.payload for frame in running.keeper.seen if frame.kind == "L"]
    assert len(events) < 160
    dropped = sum(int(payload.partition(b"dropped.log=")[2]) for payload in events if b"dropped.log=" in payload)
    told = len([payload for payload in events if b"event=" in payload])
    assert (told + dropped, dropped > 4800) == (5001, True)


def test_stops_without_end_are_few_for_the_broker(running: Fake) -> None:
    """An agent that stops and continues itself in a loop does not keep the broker busy."""
    for _ in range(5000):
        running.guest.send("Z", u32(0))
    running.fine()
    assert 1 <= len([frame for frame in running.keeper.seen if frame.kind == "Z"]) <= 1000


def test_notices_wait_for_nobody(running: Fake) -> None:
    """A broker that reads slowly: notices are dropped and counted, the guest is not held up, the run goes on."""
    for _ in range(3000):
        running.guest.send("N", u32(1, 2) + b"\1" + frames.encode_list([b"x" * 2000]))
    running.fine()


def test_a_terminal_is_only_what_was_asked_for(place: Place) -> None:
    """A command with a pty: a start before its terminal is there ends the machine; in order it runs."""
    for early in (True, False):
        fake = Fake(place)
        fake.guest.begun()
        fake.keeper.until("P")
        fake.keeper.go("/bin/agent", flags=PTY)
        fake.guest.until("G")
        if early:
            fake.guest.send("R", u32(0, 1))
            fake.refused("a start that was not asked for")
        else:
            fake.guest.send("M", u32(0))
            (master,) = fake.keeper.frame("M", 0).descriptors
            fake.keeper.channel.send("M", u32(0))
            assert len(fake.guest.until("M")) == 4 + 4 + 16 + 32
            fake.guest.send("R", u32(0, 1))
            fake.guest.send("D", u32(TERMINAL) + b"shown")
            os.set_blocking(master, True)
            assert os.read(master, 100) == b"shown"
            os.close(master)
        fake.close()


def test_an_end_is_told_only_when_its_output_is_out(running: Fake) -> None:
    """`E` in the same breath as output: the caller has the output first."""
    running.guest.send("D", u32(STDOUT) + b"last words")
    running.guest.send("E", u32(0) + b"\0")
    assert running.keeper.ended() == 0
    assert os.read(running.out, 100) == b"last words"  # type: ignore[attr-defined]


def test_a_guest_that_vanishes_is_told(running: Fake) -> None:
    """Its channel ends while its monitor lives: `guest-ended`."""
    running.guest.connection.close()
    assert running.keeper.died()["reason"] == "guest-ended"
    assert running.keeper.ended() == 137


def test_a_vsock_that_is_not_there_yet_is_tried_again(place: Place) -> None:
    """The monitor makes its socket late, and the guest listens later still: the keeper comes back until it does."""
    path = place.directory / "vsock.sock"
    keeper = Keeper(place, "--vsock", str(path), monitor=["/bin/sleep", "60"])
    keeper.send_begin()
    time.sleep(0.3)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()
        listener.settimeout(10)
        for answer in (b"", b"nonsense\n", b"OK 7\n", b"OK 8\n", b"OK 9\n"):
            connection, _ = listener.accept()
            assert connection.recv(13) == b"CONNECT 5000\n"
            connection.sendall(answer)
            if answer.startswith(b"OK"):
                # One that is cut before the guest has said hello may be a restored guest's: it is tried again, thrice.
                connection.settimeout(10)
                assert connection.recv(5) == struct.pack("<IB", 20, ord("J"))
            connection.close()
    assert keeper.died()["reason"] == "guest-ended"
    keeper.close()


def test_the_broker_is_not_held_up_by_a_silent_guest(running: Fake) -> None:
    """A guest that says nothing at all: signals and a kill of the broker's still work."""
    running.keeper.channel.send("S", b"\17")
    assert running.guest.until("S") == b"\17"
    assert wait_for(lambda: running.keeper.process.poll() is None, 0.5)
    running.keeper.channel.send("K")
    assert running.keeper.over(5) == 137
