"""A channel over a real socket: whole frames, descriptors with their frame, limits, and no leak."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.host import frames

pytestmark = pytest.mark.kernel


@pytest.fixture
def ends() -> Iterator[tuple[frames.Channel, socket.socket]]:
    """A channel, and the raw socket of its peer."""
    ours, theirs = socket.socketpair()
    channel = frames.Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def open_count() -> int:
    """Return how many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_frames_arrive_whole_however_they_are_cut(ends: tuple[frames.Channel, socket.socket]) -> None:
    """Byte by byte or all at once, each frame comes out once and complete."""
    channel, peer = ends
    data = frames.encode("A", b"y") + frames.encode("K") + frames.encode("F", bytes(1000))
    for byte in data:
        peer.send(bytes([byte]))
        if frame := channel.receive():
            assert frame in {("A", b"y", ()), ("K", b"", ()), ("F", bytes(1000), ())}
    peer.sendall(data)
    assert [channel.receive().kind for _ in range(3)] == ["A", "K", "F"]
    assert channel.receive() is None


def test_descriptors_stay_with_their_frame(ends: tuple[frames.Channel, socket.socket]) -> None:
    """Frames without descriptors around one with some do not take or lose any."""
    channel, peer = ends
    before = open_count()
    sender = frames.Channel(peer.dup())
    with Path(os.devnull).open("rb") as null:
        sender.send("A", b"y")
        sender.send("D", b"", [null.fileno(), null.fileno()])
        sender.send("A", b"n")
    received = [channel.receive() for _ in range(3)]
    assert [(frame.kind, len(frame.descriptors)) for frame in received] == [("A", 0), ("D", 2), ("A", 0)]
    assert not any(os.get_inheritable(fd) for fd in received[1].descriptors)
    for descriptor in received[1].descriptors:
        os.close(descriptor)
    sender.close()
    assert open_count() == before


def test_a_frame_that_has_to_wait_keeps_its_descriptors(ends: tuple[frames.Channel, socket.socket]) -> None:
    """What the socket does not take is kept with copies of the descriptors, and goes out by flush."""
    channel, peer = ends
    before = open_count()
    reader = frames.Channel(peer.dup())
    with Path(os.devnull).open("rb") as null:
        channel.send("B", bytes(3_000_000))
        channel.send("D", b"x", [null.fileno()])
    assert channel.pending
    seen = []
    while len(seen) < 2:
        channel.flush()
        if frame := reader.receive():
            seen.append(frame)
    assert (len(seen[0].payload), seen[1].payload, len(seen[1].descriptors)) == (3_000_000, b"x", 1)
    assert not channel.pending
    os.close(seen[1].descriptors[0])
    reader.close()
    assert open_count() == before


def test_a_peer_that_does_not_read_is_given_up(ends: tuple[frames.Channel, socket.socket]) -> None:
    """What is kept for a peer is bounded."""
    channel, _ = ends
    for _ in range(2):
        channel.send("B", bytes(frames.MAX_PAYLOAD))
    with pytest.raises(frames.FrameError, match="does not read"):
        channel.send("B", bytes(frames.MAX_PAYLOAD))


def test_too_many_descriptors_break_the_channel_and_leak_none(ends: tuple[frames.Channel, socket.socket]) -> None:
    """Attack: 17 descriptors in one frame. All that arrived are closed."""
    channel, peer = ends
    before = open_count()
    with Path(os.devnull).open("rb") as null:
        socket.send_fds(peer, [frames.encode("D")], [null.fileno()] * 17)
        with pytest.raises(frames.FrameError, match="descriptors"):
            channel.receive()
        with pytest.raises(ValueError, match="exceed"):
            channel.send("D", b"", [null.fileno()] * 17)
    assert open_count() == before


def test_descriptors_behind_the_first_byte_break_the_channel(ends: tuple[frames.Channel, socket.socket]) -> None:
    """Attack: descriptors smuggled into the middle of a header or a payload."""
    channel, peer = ends
    before = open_count()
    data = frames.encode("F", b"payload")
    for cut in (2, 7):
        with Path(os.devnull).open("rb") as null:
            ours, theirs = socket.socketpair()
            other = frames.Channel(ours)
            theirs.send(data[:cut])
            assert other.receive() is None
            socket.send_fds(theirs, [data[cut:]], [null.fileno()])
            with pytest.raises(frames.FrameError, match="behind"):
                other.receive()
            other.close()
            theirs.close()
    assert open_count() == before
    assert channel.receive() is None
    assert peer.fileno() >= 0


def test_the_end_between_frames_is_told_from_the_end_within(ends: tuple[frames.Channel, socket.socket]) -> None:
    """A clean end and a cut-off frame are different errors, of one family."""
    channel, peer = ends
    peer.close()
    with pytest.raises(frames.ChannelClosedError):
        channel.receive()
    ours, theirs = socket.socketpair()
    other = frames.Channel(ours)
    theirs.send(b"\4\0\0\0F")
    theirs.close()
    with pytest.raises(frames.FrameError, match="within"):
        other.receive()
    other.close()
    with pytest.raises(frames.FrameError, match="gone"):
        channel.send("A", b"y")
