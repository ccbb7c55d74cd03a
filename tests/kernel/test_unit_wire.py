"""Requests to hostd over real sockets: honest ones are read whole, others are refused, and no descriptor is kept."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, RetryError, UsageError
from cloister.host.frames import FrameError, encode, encode_list
from cloister.host.unit_wire import Wire, read_control, read_request
from support.hostd_client import sealed_bytes

pytestmark = pytest.mark.kernel
FIELDS = [b"verb=run", b"agent=pi"]
REST = encode("U", b"{}") + encode("V", encode_list([b"word"])) + encode("N", encode_list([b"A=b"]))


class Ends:
    """Both ends of a connection, and the descriptors of a request."""

    def __init__(self, folder: str) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.link, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.wire = Wire(self.ours, limit_s=0.5)
        self.null = os.open("/dev/null", os.O_RDWR)
        self.folder = os.open(folder, os.O_PATH | os.O_DIRECTORY)

    def good(self) -> list[int]:
        """Return the descriptors of an honest request without anything carried."""
        return [self.link.fileno(), self.null, self.null, self.null, self.folder, self.folder]

    def send(self, data: bytes, descriptors: list[int] | None = None) -> None:
        """Send bytes, with descriptors on the first of them."""
        if descriptors:
            socket.send_fds(self.theirs, [data], descriptors)
        else:
            self.theirs.sendall(data)

    def close(self) -> None:
        """Close everything."""
        self.wire.close()
        for sock in (self.theirs, self.link, self.other):
            sock.close()
        os.close(self.null)
        os.close(self.folder)


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    """A connection, after which every descriptor is closed again."""
    before = set(os.listdir("/proc/self/fd"))
    made = Ends(str(tmp_path))
    yield made
    made.close()
    assert set(os.listdir("/proc/self/fd")) <= before


def read(ends: Ends) -> None:
    """Read a request that must be refused, or close what came with it."""
    request = read_request(ends.wire, ends.wire.receive())
    for descriptor in (request.link, *request.streams, request.workspace, request.directory, request.carry):
        if descriptor >= 0:
            os.close(descriptor)


def test_an_honest_request(ends: Ends) -> None:
    """Fields, descriptors, part, words and environment arrive as they were sent, with a sealed archive or without."""
    archive = sealed_bytes(b"x")
    ends.send(encode("L", encode_list([*FIELDS, b"pty=1"])), [*ends.good(), archive])
    ends.send(REST)
    request = read_request(ends.wire, ends.wire.receive())
    assert request.fields == {"verb": "run", "agent": "pi", "pty": "1"}
    assert (request.part, request.words) == (b"{}", encode_list([b"word"]))
    for descriptor in (request.link, *request.streams, request.workspace, request.directory, request.carry, archive):
        os.close(descriptor)
    ends.send(encode("L", encode_list(FIELDS)), ends.good())
    ends.send(REST)
    read(ends)


@pytest.mark.parametrize(
    "fields",
    [
        [b"verb=run"], [b"agent=pi"], [b"verb=run", b"agent=../x"], [b"verb=run", b"agent="], [*FIELDS, b"agent=pi"],
        [*FIELDS, b"user=bob"], [*FIELDS, b"caller_uid=0"], [*FIELDS, b"account=root"], [*FIELDS, b"root=/"],
        [*FIELDS, b"home=/root"], [*FIELDS, b"plain"], [*FIELDS, b"profile=a b"], [b"verb=end", b"agent=pi"],
        [*FIELDS, b"run=" + b"x" * (70 << 10)],
    ],
)  # fmt: skip
def test_no_other_field(ends: Ends, fields: list[bytes]) -> None:
    """PF1: no field names a user, an account or a path, none stands twice, and they are bounded."""
    ends.send(encode("L", encode_list(fields)), ends.good())
    ends.send(REST)
    with pytest.raises(UsageError):
        read(ends)


@pytest.mark.parametrize(
    ("names", "further"),
    [("copy", 1), ("copy,repository", 2), ("repository", 1), ("", 0)],
)
def test_further_directories_have_names(ends: Ends, names: str, further: int) -> None:
    """The directory for changes and a repository elsewhere arrive under the names that the field gives them."""
    ends.send(encode("L", encode_list([*FIELDS, f"brings={names}".encode()])), [*ends.good(), *[ends.folder] * further])
    ends.send(REST)
    request = read_request(ends.wire, ends.wire.receive())
    came = {"carry": request.carry, "copy": request.copy, "repository": request.repository}
    assert {name for name, descriptor in came.items() if descriptor >= 0} == set(filter(None, names.split(",")))
    assert "brings" not in request.fields
    for descriptor in (request.link, *request.streams, request.workspace, request.directory, *came.values()):
        if descriptor >= 0:
            os.close(descriptor)


@pytest.mark.parametrize(
    ("names", "make"),
    [
        ("repository,copy", lambda ends: [ends.folder] * 2),
        ("copy,copy", lambda ends: [ends.folder] * 2),
        ("home", lambda ends: [ends.folder]),
        ("copy", lambda _: []),
        ("copy", lambda ends: [ends.folder] * 2),
        ("copy", lambda ends: [ends.null]),
        ("repository", lambda ends: [ends.null]),
        ("carry,copy", lambda ends: [ends.folder] * 2),
    ],
)
def test_no_other_descriptor(ends: Ends, names: str, make: Callable[[Ends], list[int]]) -> None:
    """Another name or order, more or fewer than named, and what is no directory: all refused."""
    ends.send(encode("L", encode_list([*FIELDS, f"brings={names}".encode()])), [*ends.good(), *make(ends)])
    ends.send(REST)
    with pytest.raises(UsageError):
        read(ends)


def _swap(index: int, make: Callable[[Ends], int]) -> Callable[[Ends], list[int]]:
    return lambda ends: [*(found := ends.good())[:index], make(ends), *found[index + 1 :]]


@pytest.mark.parametrize(
    "descriptors",
    [
        lambda _: [],
        lambda ends: ends.good()[:5],
        lambda ends: [*ends.good(), ends.null, ends.null],
        lambda ends: [*ends.good(), ends.null],
        lambda ends: [*ends.good(), ends.folder],
        _swap(0, lambda ends: ends.null),
        _swap(1, lambda ends: ends.folder),
        _swap(3, lambda ends: ends.folder),
        _swap(4, lambda ends: ends.null),
        _swap(5, lambda ends: ends.link.fileno()),
    ],
)
def test_wrong_descriptors(ends: Ends, descriptors: Callable[[Ends], list[int]]) -> None:
    """Too few, too many and those of another kind are refused: a stream is no directory, an archive is sealed."""
    ends.send(encode("L", encode_list(FIELDS)), descriptors(ends))
    ends.send(REST)
    with pytest.raises(UsageError):
        read(ends)


def test_a_memory_file_that_can_change_is_refused(ends: Ends) -> None:
    """An archive that its sender could still write to, or a file of a file system that may never answer, is none."""
    memory = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    try:
        ends.send(encode("L", encode_list(FIELDS)), [*ends.good(), memory])
        with pytest.raises(UsageError, match="sealed"):
            read(ends)
    finally:
        os.close(memory)


@pytest.mark.parametrize(
    "rest",
    [
        encode("U", b"{}") * 2,
        encode("X", b""),
        encode("L", encode_list(FIELDS)),
        encode("V", b"\xff\xff\xff\xff"),
        encode("V", encode_list([b"a\0b"])),
        encode("V", encode_list([b"x"]) + b"more"),
        encode("N", encode_list([b"no-value"])),
        encode("V", encode_list([b"x" * (1 << 20)])),
        b"\xff\xff\xff\xffU",
    ],
)
def test_wrong_frames(ends: Ends, rest: bytes) -> None:
    """Frames that stand twice, are unknown, malformed or too long end the request."""
    ends.send(encode("L", encode_list(FIELDS)), ends.good())
    sending = threading.Thread(
        target=lambda: contextlib.suppress(OSError).__enter__() or ends.theirs.sendall(rest + REST)
    )
    sending.start()
    with pytest.raises((UsageError, FrameError)):
        read(ends)
    ends.wire.close()
    sending.join()


def test_a_slow_caller_is_sent_away(ends: Ends) -> None:
    """Who sends a byte now and then has the time of one request, not of one byte."""
    begin = time.monotonic()
    stop = threading.Event()

    def trickle() -> None:
        data = encode("L", encode_list(FIELDS))
        for index in range(len(data)):
            if stop.wait(0.05):
                return
            ends.theirs.send(data[index : index + 1])

    thread = threading.Thread(target=trickle)
    thread.start()
    with pytest.raises(RetryError):
        ends.wire.receive()
    stop.set()
    thread.join()
    assert time.monotonic() - begin < 3


def test_control_takes_no_descriptors(ends: Ends) -> None:
    """A request of the broker with descriptors is refused, and they are closed."""
    ends.send(encode("L", encode_list([b"verb=end", b"run=x"])), [ends.null])
    with pytest.raises(UsageError):
        read_control(ends.wire.receive())
    ends.send(encode("L", encode_list([b"verb=end", b"run=x"])))
    assert read_control(ends.wire.receive()) == {"verb": "end", "run": "x"}


@given(st.lists(st.tuples(st.sampled_from("LUVNXF"), st.binary(max_size=60), st.integers(0, 8)), max_size=6))
def test_any_frames(pieces: list[tuple[str, bytes, int]]) -> None:
    """Whatever is sent is a request or a refusal, never anything else, and every descriptor is closed."""
    before = len(os.listdir("/proc/self/fd"))
    ends = Ends("/")
    ends.wire.allow(0.05)
    try:
        for kind, payload, count in pieces:
            ends.send(encode(kind, payload), [*ends.good(), ends.null, ends.null][:count])
        ends.theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(CloisterError, FrameError):
            read(ends)
    finally:
        ends.close()
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.lists(st.binary(max_size=30), max_size=5))
def test_any_fields(items: list[bytes]) -> None:
    """Whatever fields are sent with good descriptors: a request that names run and an agent, or a refusal."""
    ends = Ends("/")
    try:
        ends.send(encode("L", encode_list([*FIELDS, *items])), ends.good())
        ends.send(REST)
        with contextlib.suppress(UsageError):
            read(ends)
    finally:
        ends.close()
