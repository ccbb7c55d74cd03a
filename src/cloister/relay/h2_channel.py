"""One stream of an HTTP/2 connection: bytes that wait to be sent, and bytes that came and were not passed on.

What a stream wants to send waits here until the other side's window and the transport take it,
and whoever produces it is told to stop. What was received is acknowledged only when it could be
passed on, so the sender stops by itself. Frames are for `h2_endpoint`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from h2.connection import H2Connection
from h2.errors import ErrorCodes

from cloister.egress.http1 import Headers

if TYPE_CHECKING:
    from cloister.relay.h2_endpoint import Endpoint

HIGH, LOW = 64 * 1024, 16 * 1024
"""Bytes waiting in a stream at which its producer is stopped, and told to go on."""


class Taker(Protocol):
    """What a stream means to one of the roles."""

    def on_data(self, data: bytes) -> None:
        """Take a piece of a body."""

    def on_end(self, trailers: Headers) -> None:
        """Take its end."""

    def on_reset(self, *, processed: bool) -> None:
        """Take the news that the stream is gone; `processed` is False where the other side did not look at it."""


class Channel:
    """One stream's bytes: those that wait to be sent, and those that were received and not passed on yet."""

    def __init__(self, endpoint: Endpoint, number: int, taker: Taker) -> None:
        """Belong to an endpoint."""
        self.endpoint, self.number, self.taker = endpoint, number, taker
        self.trailers: Headers = []
        """Those received."""
        self.on_pressure: Callable[[bool], None] | None = None
        self.sent = False
        """Whether our end was sent."""
        self.received = False
        """Whether the other side's end came."""
        self._waiting: deque[memoryview] = deque()
        self._size = 0
        self._ending: Headers | None = None
        self._owed = 0
        self._paused = self._pressed = False

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self.endpoint.channels.get(self.number) is not self

    def write(self, data: bytes) -> None:
        """Send a piece when it can be sent."""
        if self.closed or self._ending is not None or not data:
            return
        self._waiting.append(memoryview(data))
        self._size += len(data)
        self.endpoint.wants(self)
        self._press()

    def end(self, trailers: Headers) -> None:
        """Send the end after everything that waits."""
        if not self.closed and self._ending is None:
            self._ending = trailers
            self.endpoint.wants(self)

    def reset(self, code: ErrorCodes = ErrorCodes.CANCEL) -> None:
        """Give the stream up."""
        if not self.closed:
            self.endpoint.reset(self, code)

    def pause(self, *, paused: bool) -> None:
        """Stop or go on taking bytes: what comes while paused is not acknowledged, so no more than a window comes."""
        self._paused = paused
        if not paused and self._owed:
            owed, self._owed = self._owed, 0
            self.endpoint.acknowledge(self.number, owed)

    def listen(self, on_pressure: Callable[[bool], None]) -> None:
        """Set who is told when too much waits, and tell how it is now."""
        self.on_pressure = on_pressure
        on_pressure(self._pressed)

    # For the endpoint.

    def arrived(self, data: bytes, size: int) -> None:
        """Take a piece; `size` counts for the window."""
        if self._paused:
            self._owed += size
        else:
            self.endpoint.acknowledge(self.number, size)
        if data:
            self.taker.on_data(data)

    def drop(self) -> None:
        """Give back what is owed to the window of the connection: the stream is over."""
        self._waiting.clear()
        self._size = 0
        if self._owed:
            owed, self._owed = self._owed, 0
            self.endpoint.acknowledge(self.number, owed)

    def send_some(self, machine: H2Connection) -> bool:
        """Send one frame if one can be sent; say whether another might follow."""
        if self.sent:
            return False
        if self._waiting:
            piece = self._waiting[0]
            room = min(machine.local_flow_control_window(self.number), machine.max_outbound_frame_size, len(piece))
            if room <= 0:
                return False
            if room == len(piece):
                self._waiting.popleft()
            else:
                self._waiting[0] = piece[room:]
            last = not self._waiting and self._ending == []
            machine.send_data(self.number, bytes(piece[:room]), end_stream=last)
            self._size -= room
            self.sent = last
            self._press()
        elif self._ending:
            machine.send_headers(self.number, self._ending, end_stream=True)
            self.sent = True
        elif self._ending is not None:
            machine.end_stream(self.number)
            self.sent = True
        return not self.sent and (bool(self._waiting) or self._ending is not None)

    def _press(self) -> None:
        """Tell the producer when it must stop, or may go on."""
        pressed = self._size > (LOW if self._pressed else HIGH)
        if pressed != self._pressed:
            self._pressed = pressed
            if self.on_pressure is not None:
                self.on_pressure(pressed)
