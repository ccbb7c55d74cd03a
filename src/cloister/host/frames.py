"""Frames and lists of the shim protocol, and one socket's worth of them.

The Python twin of `shim/frame.c`; the layout stands in ARCHITECTURE.md, "Shim protocol".
This is not the meaning of any frame, and it never waits: whoever owns the event loop calls
`receive` when the socket is readable and `flush` when it is writable. A peer is not
trusted: every length is checked before anything is stored.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MAX_PAYLOAD = 4 << 20
MAX_DESCRIPTORS = 16

_HEADER = struct.Struct("<IB")
_COUNT = struct.Struct("<I")
_INT = struct.Struct("i")
_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT.size)
# What a peer that does not read may make us keep; one largest frame must always fit.
_MAX_PENDING = 2 * MAX_PAYLOAD


class FrameError(ConnectionError):
    """The peer broke the protocol, or the channel can take no more; close it."""


class ChannelClosedError(FrameError):
    """The peer closed its end between two frames."""


class Frame(NamedTuple):
    """One frame. Whoever receives it owns its descriptors."""

    kind: str
    payload: bytes = b""
    descriptors: tuple[int, ...] = ()


def encode(kind: str, payload: bytes = b"") -> bytes:
    """Return header and payload of one frame.

    Raises:
        ValueError: `kind` is not one ASCII character, or the payload exceeds 4 MiB.
    """
    if len(kind) != 1 or not kind.isascii():
        raise ValueError(f"a frame type is one ASCII character, not {kind!r}")
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a payload of {len(payload)} bytes exceeds {MAX_PAYLOAD}")
    return _HEADER.pack(len(payload), ord(kind)) + payload


def encode_list(items: Iterable[bytes]) -> bytes:
    """Return a list: its count, then every item behind its length."""
    stored = list(items)
    parts = [_COUNT.pack(len(stored))]
    for item in stored:
        parts += (_COUNT.pack(len(item)), item)
    return b"".join(parts)


def decode_list(payload: bytes, offset: int = 0) -> tuple[list[bytes], int]:
    """Return the list that begins at `offset`, and the offset behind it.

    Raises:
        FrameError: a count or a length points beyond the payload.
    """
    count, offset = decode_u32(payload, offset)
    if count > (len(payload) - offset) // _COUNT.size:
        raise FrameError(f"a list of {count} items does not fit into its frame")
    items = []
    for _ in range(count):
        length, offset = decode_u32(payload, offset)
        if length > len(payload) - offset:
            raise FrameError(f"an item of {length} bytes does not fit into its frame")
        items.append(payload[offset : offset + length])
        offset += length
    return items, offset


def encode_u32(value: int) -> bytes:
    """Return an unsigned 32-bit number, little endian."""
    return _COUNT.pack(value)


def decode_u32(payload: bytes, offset: int = 0) -> tuple[int, int]:
    """Return the number at `offset`, and the offset behind it.

    Raises:
        FrameError: the payload ends before the number does.
    """
    if offset < 0 or len(payload) - offset < _COUNT.size:
        raise FrameError("a number does not fit into its frame")
    (value,) = _COUNT.unpack_from(payload, offset)
    return value, offset + _COUNT.size


class Channel:
    """One end of a stream socket that carries frames. Owns the socket; makes it non-blocking."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._arrived = bytearray()
        self._descriptors: list[int] = []
        self._wanted = _HEADER.size
        self._kind = ""
        self._pending: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._pending_size = 0

    def fileno(self) -> int:
        """Return the socket's descriptor; -1 once closed."""
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether something waits for the socket to become writable: call `flush` then."""
        return bool(self._pending)

    def receive(self) -> Frame | None:
        """Return the next whole frame, or None when there is none yet.

        Raises:
            ChannelClosedError: the peer closed the channel between two frames.
            FrameError: the peer broke the protocol, or closed within a frame.
        """
        try:
            return self._receive()
        except FrameError:
            self._drop_descriptors()
            raise

    def send(self, kind: str, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Send one frame, or keep what the socket does not take now (see `pending`).

        The caller keeps its descriptors; copies travel, also when the frame has to wait.

        Raises:
            ValueError: the frame is larger than the protocol allows.
            FrameError: the peer is gone, or reads nothing while frames pile up.
        """
        if len(descriptors) > MAX_DESCRIPTORS:
            raise ValueError(f"{len(descriptors)} descriptors exceed {MAX_DESCRIPTORS}")
        data = encode(kind, payload)
        if self._pending_size + len(data) > _MAX_PENDING:
            raise FrameError("the peer does not read")
        copies: list[int] = []
        try:
            copies.extend(os.dup(descriptor) for descriptor in descriptors)
        except OSError:
            _close_all(copies)
            raise
        self._pending.append((memoryview(data), tuple(copies)))
        self._pending_size += len(data)
        self.flush()

    def flush(self) -> bool:
        """Send what waits; return whether all of it is out.

        Raises:
            FrameError: the peer is gone.
        """
        while self._pending:
            data, descriptors = self._pending[0]
            try:
                sent = self._send_some(data, descriptors)
            except BlockingIOError:
                return False
            except OSError as error:
                raise FrameError(f"the peer is gone: {error.strerror}") from error
            # Descriptors travel with the first byte, so they are out now.
            _close_all(descriptors)
            self._pending_size -= sent
            if sent == len(data):
                self._pending.popleft()
            else:
                self._pending[0] = (data[sent:], ())
        return True

    def close(self) -> None:
        """Close the socket and every descriptor still held. May be called again."""
        self._drop_descriptors()
        while self._pending:
            _close_all(self._pending.popleft()[1])
        self._pending_size = 0
        self._socket.close()

    def _send_some(self, data: memoryview, descriptors: tuple[int, ...]) -> int:
        if descriptors:
            rights = struct.pack(f"{len(descriptors)}i", *descriptors)
            return self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_NOSIGNAL)
        return self._socket.send(data, socket.MSG_NOSIGNAL)

    def _receive(self) -> Frame | None:
        while True:
            if len(self._arrived) == self._wanted:
                if self._kind:
                    return self._take()
                self._open_payload()
                continue
            if not self._read_some():
                return None

    def _open_payload(self) -> None:
        """Turn from header to payload: a header is read on its own, so that descriptors belong to its frame."""
        length, kind = _HEADER.unpack(self._arrived)
        if length > MAX_PAYLOAD:
            raise FrameError(f"a payload of {length} bytes exceeds {MAX_PAYLOAD}")
        self._arrived = bytearray()
        self._wanted = length
        self._kind = chr(kind)

    def _take(self) -> Frame:
        frame = Frame(self._kind, bytes(self._arrived), tuple(self._descriptors))
        self._arrived = bytearray()
        self._descriptors = []
        self._wanted = _HEADER.size
        self._kind = ""
        return frame

    def _read_some(self) -> bool:
        """Read once; return False when nothing has arrived."""
        at_start = not self._arrived and not self._kind
        room = min(self._wanted - len(self._arrived), 1 << 18)
        try:
            # Not socket.recv_fds: it ignores its flags (CPython 3.11), and another thread's child would inherit these.
            data, ancillary, flags, _ = self._socket.recvmsg(room, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError as error:
            raise FrameError(f"the channel failed: {error.strerror}") from error
        descriptors = _descriptors_of(ancillary)
        self._descriptors += descriptors
        if flags & socket.MSG_CTRUNC:
            raise FrameError(f"more than {MAX_DESCRIPTORS} descriptors in one frame")
        if descriptors and not at_start:
            raise FrameError("descriptors behind the first byte of a frame")
        if not data:
            if at_start and not descriptors:
                raise ChannelClosedError("the peer closed the channel")
            raise FrameError("the peer closed the channel within a frame")
        self._arrived += data
        return True

    def _drop_descriptors(self) -> None:
        _close_all(self._descriptors)
        self._descriptors = []


def _descriptors_of(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found += struct.unpack(f"{len(data) // _INT.size}i", data[: len(data) // _INT.size * _INT.size])
    return found


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
