"""One end of a frame channel on an event loop: the broker's side of a client, or of a shim's half.

Reads when the loop says so, queues what the socket does not take, closes once. What the
frames mean is for who owns the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable

from cloister.host.frames import Channel, Frame, FrameError

_MAX_QUEUE_BYTES = 16 << 20


class Connection:
    """Frames over a non-blocking Unix socket."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        on_frame: Callable[[Connection, Frame], None],
        on_close: Callable[[Connection], None],
    ) -> None:
        """Start reading `sock`, which belongs to the connection from now on."""
        sock.setblocking(False)
        self._loop = loop
        self._sock = sock
        self._channel = Channel(sock)
        self._on_frame = on_frame
        self._on_close = on_close
        self._queue: deque[tuple[bytes, bytes, tuple[int, ...]]] = deque()
        self._queued_bytes = 0
        self._closing = False
        self.closed = False
        loop.add_reader(sock.fileno(), self._readable)

    def rebind(self, on_frame: Callable[[Connection, Frame], None], on_close: Callable[[Connection], None]) -> None:
        """Give the connection to another owner: a request that became a run."""
        self._on_frame = on_frame
        self._on_close = on_close

    def send(self, kind: bytes, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        """Queue a frame; descriptors are duplicated, the caller keeps its own. Sending to a closed end does nothing."""
        if self.closed or self._closing:
            return
        self._queued_bytes += len(payload)
        if self._queued_bytes > _MAX_QUEUE_BYTES:
            self.close()
            return
        self._queue.append((kind, payload, tuple(os.dup(descriptor) for descriptor in descriptors)))
        self._flush()

    def close(self) -> None:
        """Close once everything queued is sent; a peer that does not read is given up at once."""
        if self.closed:
            return
        self._closing = True
        if not self._queue:
            self._shut()

    def abort(self) -> None:
        """Close now."""
        self._queue.clear()
        self._shut()

    def _flush(self) -> None:
        while self._queue:
            kind, payload, descriptors = self._queue[0]
            try:
                done = self._channel.send(kind, payload, descriptors)
            except OSError:
                self.abort()
                return
            if not done:
                self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            self._queue.popleft()
            self._queued_bytes -= len(payload)
            _close_all(descriptors)
        if not self.closed:
            self._loop.remove_writer(self._sock.fileno())
            if self._closing:
                self._shut()

    def _readable(self) -> None:
        try:
            frames = self._channel.receive()
        except (FrameError, OSError):
            self.abort()
            return
        if frames is None:
            self.abort()
            return
        for frame in frames:
            if self.closed:
                _close_all(frame.descriptors)
            else:
                self._on_frame(self, frame)

    def _shut(self) -> None:
        if self.closed:
            return
        self.closed = True
        for _, _, descriptors in self._queue:
            _close_all(descriptors)
        self._queue.clear()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._on_close(self)


def _close_all(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
