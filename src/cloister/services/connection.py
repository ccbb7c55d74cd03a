"""One end of a frame channel on an event loop: the broker's side of a client, or of a shim's half.

Reads when the loop says so, writes what the socket did not take at once, closes once. What the
frames mean is for who owns the connection; an owner may hand it on (`rebind`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable

from cloister.host.frames import Channel, ChannelClosedError, Frame, FrameError


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
        self._loop = loop
        self._channel = Channel(sock)
        self._descriptor = sock.fileno()
        self._on_frame = on_frame
        self._on_close = on_close
        self._peer_pid = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
        self._closing = self._broken = False
        self.closed = False
        loop.add_reader(self._descriptor, self._readable)

    @property
    def peer_pid(self) -> int:
        """The process at the other end, by the kernel's word (unix(7), SO_PEERCRED)."""
        return self._peer_pid

    def rebind(self, on_frame: Callable[[Connection, Frame], None], on_close: Callable[[Connection], None]) -> None:
        """Give the connection to another owner: a request that became a run."""
        self._on_frame = on_frame
        self._on_close = on_close

    def send(self, kind: str, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        """Send a frame now or when there is room; copies of the descriptors travel. A closed end takes nothing."""
        if self.closed or self._closing or self._broken:
            return
        try:
            self._channel.send(kind, payload, descriptors)
        except FrameError:
            # The other end has gone. What it said before is still there to be read, and counts: an agent's end
            # must not look like the sandbox's because a signal came a moment too late.
            self._broken = True
            self._loop.call_soon(self._read_last)
            return
        if self._channel.pending:
            self._loop.add_writer(self._descriptor, self._writable)

    def hear(self) -> None:
        """Take in, now, what the other end has said already: whoever comes later in the loop may have ended first."""
        if not self.closed:
            self._readable()

    def lend(self) -> int:
        """Stop reading, for somebody else shall; return the descriptor to hand on, which stays ours."""
        self._loop.remove_reader(self._descriptor)
        return self._descriptor

    def close(self) -> None:
        """Close once everything is sent."""
        self._closing = True
        if not self.closed and not self._channel.pending:
            self.abort()

    def abort(self) -> None:
        """Close now."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        self._channel.close()
        self._on_close(self)

    def _writable(self) -> None:
        try:
            if not self._channel.flush():
                return
        except FrameError:
            self._read_last()
            return
        self._loop.remove_writer(self._descriptor)
        if self._closing:
            self.abort()

    def _read_last(self) -> None:
        """Hear what the other end said before it went."""
        self._readable()
        self.abort()

    def _readable(self) -> None:
        while not self.closed:
            try:
                frame = self._channel.receive()
            except (ChannelClosedError, FrameError):
                self.abort()
                return
            if frame is None:
                return
            try:
                self._on_frame(self, frame)
            except BaseException:
                self.abort()  # an owner that fails on a frame must not leave its run half alive
                raise


def close_all(descriptors: tuple[int, ...]) -> None:
    """Close descriptors that came with a frame nobody wants."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
