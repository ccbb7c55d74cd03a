"""The client's side of HTTP/2: each stream is an exchange, as a request of HTTP/1.1 is.

Requests run at the same time, up to the number of streams that is allowed. What may be requested
is for the handler to decide; WebSocket over HTTP/2 (RFC 8441) is not offered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from h2 import events
from h2.errors import ErrorCodes

from cloister.egress import denial, http2
from cloister.egress.decision import Verdict
from cloister.egress.http1 import Body, Headers, HttpError
from cloister.relay.exchange import Exchange
from cloister.relay.h2_channel import Channel
from cloister.relay.h2_endpoint import Endpoint
from cloister.relay.override import override
from cloister.relay.session import Limits

if TYPE_CHECKING:
    from cloister.relay.connection import HttpConnection


class H2Connection(Endpoint):
    """One connection of a client that speaks HTTP/2."""

    def __init__(
        self, limits: Limits, handle: Callable[[Exchange], None], refuse: Callable[[HttpError], Verdict]
    ) -> None:
        """Take what to do with a request, and with one that cannot be read."""
        super().__init__(client_side=False)
        self.limits = limits
        self.on_lost: list[Callable[[], None]] = []
        self._handle, self._refuse = handle, refuse
        self._stamp = self.loop.time()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever works for this client."""
        super().connection_lost(exc)
        for callback in self.on_lost:
            callback()

    @override
    def on_head(self, event: events.Event) -> None:
        """Begin an exchange."""
        if not isinstance(event, events.RequestReceived) or self.leaving:
            return
        fields = list(event.headers)
        stream = H2Stream(self, event.stream_id)
        stream.channel.received = event.stream_ended is not None
        self.channels[event.stream_id] = stream.channel
        self._stamp = self.loop.time()
        try:
            if len(fields) > self.limits.head_fields:
                raise HttpError("head-too-large", "the head of the request is too large")  # noqa: TRY301 - one handler for all
            head = http2.read_request(fields, ended=stream.channel.received)
            exchange = H2Exchange(stream, head)
        except HttpError as error:
            self._answer_unreadable(stream.channel, self._refuse(error))
            return
        stream.exchange = exchange
        self._handle(exchange)

    @override
    def on_sent(self, channel: Channel) -> None:
        """The response is complete: a body that still comes has no place to go (RFC 9113, section 8.1)."""
        if not channel.received:
            self.reset(channel, ErrorCodes.NO_ERROR)
        super().on_sent(channel)
        self._stamp = self.loop.time()

    def sweep(self, now: float) -> None:
        """Enforce the time limits."""
        if self.leaving_now():
            return
        if not self.channels:
            if now - self._stamp > self.limits.keepalive_timeout_s:
                self.machine.close_connection()
                self.break_off()
            return
        for channel in list(self.channels.values()):
            taker = channel.taker
            if isinstance(taker, H2Stream) and taker.idle_since(now) > self.limits.idle_timeout_s:
                taker.abandon()
                channel.reset()

    def _answer_unreadable(self, channel: Channel, verdict: Verdict) -> None:
        """Refuse a request of which there is no exchange."""
        body = denial.denial_body(verdict, None)
        headers = denial.denial_headers(verdict.reason)
        fields = http2.response_fields(denial.denial_status(verdict.reason), headers, Body("length", len(body)))
        self.machine.send_headers(channel.number, fields)
        channel.write(body)
        channel.end([])


class H2Stream:
    """A stream of the client: what a connection is for an exchange of HTTP/1.1."""

    def __init__(self, connection: H2Connection, number: int) -> None:
        """Belong to a connection."""
        self.connection = connection
        self.channel = Channel(connection, number, self)
        self.exchange: H2Exchange | None = None
        self.loop = connection.loop
        self._moved, self._since = -1, 0.0

    @property
    def transport(self) -> asyncio.Transport | None:
        """The connection, while there is somebody to answer to."""
        return None if self.channel.closed else self.connection.transport

    def on_pressure(self, callback: Callable[[bool], None]) -> None:
        """Set who is told when the client reads slowly."""
        self.channel.listen(callback)

    def update_reading(self) -> None:
        """Give the client room to send only while somebody takes the bytes."""
        if self.exchange is not None:
            self.channel.pause(paused=self.exchange.waits_for_sink)

    def idle_since(self, now: float) -> float:
        """Return for how many seconds nothing has moved."""
        moved = self.exchange.bytes_up + self.exchange.bytes_down if self.exchange else 0
        if moved != self._moved:
            self._moved, self._since = moved, now
        return now - self._since

    def abandon(self) -> None:
        """Tell whoever works for this request that it is over."""
        if self.exchange is not None:
            self.exchange.abandon()

    # The channel's taker.

    def on_data(self, data: bytes) -> None:
        """Take a piece of the request's body."""
        if self.exchange is not None:
            self.exchange.on_body(data)

    def on_end(self, trailers: Headers) -> None:
        """Take its end."""
        if self.exchange is not None:
            self.exchange.on_end(trailers)

    def on_reset(self, *, processed: bool) -> None:  # noqa: ARG002 - the same for a client
        """The client does not want an answer any more."""
        self.abandon()


class H2Exchange(Exchange):
    """A request of HTTP/2 and its response."""

    def __init__(self, stream: H2Stream, head: http2.RequestHead) -> None:
        """Check the head.

        Raises:
            HttpError: when it must not be passed on.
        """
        # A stream has what handlers of inspected requests use of a connection.
        super().__init__(cast("HttpConnection", stream), head.method, head.url, head.headers, "1.1")
        self.body, self.websocket = head.body, False
        self.ended = stream.channel.received
        self._stream, self._channel = stream, stream.channel

    @override
    def on_body(self, data: bytes) -> None:
        """Take a piece; what nobody takes yet is not acknowledged."""
        super().on_body(data)
        self._stream.update_reading()

    @override
    def interim(self, status: int, phrase: bytes, headers: Headers) -> None:  # noqa: ARG002 - HTTP/2 has none
        """Pass a 1xx response on."""
        self._send(http2.response_fields(status, headers, Body("none")))

    @override
    def respond(
        self,
        status: int,
        phrase: bytes,  # noqa: ARG002 - HTTP/2 has none
        headers: Headers,
        body: Body,
        first: bytes = b"",
    ) -> None:
        """Write the response head, and a first piece of body where there is one."""
        self.started, self.status = True, status
        self._send(http2.response_fields(status, headers, body))
        if first:
            self.respond_body(first)

    @override
    def respond_body(self, data: bytes) -> None:
        """Write a piece of the response body."""
        self.bytes_down += len(data)
        self._channel.write(data)

    @override
    def respond_end(self, trailers: Headers) -> None:
        """Finish the response."""
        self._finish(http2.trailer_fields(trailers))

    @override
    def respond_message(self, status: int, headers: Headers, body: bytes) -> None:
        """Write a complete response of our own."""
        self.started, self.status = True, status
        self._send(http2.response_fields(status, headers, Body("length", len(body))))
        if self.method != "HEAD":
            self._channel.write(body)
        self._finish([])

    @override
    def fail(self) -> None:
        """Break the response off."""
        self._channel.reset(ErrorCodes.INTERNAL_ERROR)

    def _send(self, fields: Headers) -> None:
        """Send a head at once; the body follows in the channel."""
        if not self._channel.closed:
            self._channel.endpoint.machine.send_headers(self._channel.number, fields)
            self._channel.endpoint.soon()

    def _finish(self, trailers: Headers) -> None:
        """Nobody takes more of the request's body, and the response ends."""
        self.detach()
        self.on_abandon = None
        self._channel.on_pressure = None
        self._channel.end(trailers)
