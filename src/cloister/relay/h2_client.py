"""The server's side of HTTP/2: one connection, a lane per request, for one client connection only."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from h2 import events
from h2.errors import ErrorCodes
from h2.exceptions import H2Error

from cloister.egress import http1, http2
from cloister.egress.http1 import Body, Headers, HttpError
from cloister.relay.h2_channel import Channel
from cloister.relay.h2_endpoint import Endpoint
from cloister.relay.override import override

if TYPE_CHECKING:
    from cloister.relay.lanes import Outgoing
    from cloister.relay.upstream import Receiver


class H2Client(Endpoint):
    """One connection to a server that speaks HTTP/2."""

    def __init__(self) -> None:
        """Wait for the connection."""
        super().__init__(client_side=True)
        self.used = False

    @property
    def usable(self) -> bool:
        """Whether another request may be sent now."""
        most = self.machine.remote_settings.max_concurrent_streams
        return not self.finished and len(self.channels) < most

    @property
    def finished(self) -> bool:
        """Whether no request can be sent any more."""
        return self.leaving or self.leaving_now()

    def stream(self) -> H2Lane:
        """Return a lane for one request; its stream is opened by `begin`."""
        return H2Lane(self)

    @override
    def on_head(self, event: events.Event) -> None:
        """Hand the head of a response on."""
        if not isinstance(event, events.ResponseReceived | events.InformationalResponseReceived):
            return
        channel = self.channels.get(event.stream_id)
        if channel is not None and isinstance(channel.taker, H2Lane):
            ended = isinstance(event, events.ResponseReceived) and event.stream_ended is not None
            channel.taker.on_head(list(event.headers), ended=ended)


class H2Lane:
    """One request and its response."""

    reusable = True
    """The connection is, whatever became of the stream."""

    def __init__(self, client: H2Client) -> None:
        """Belong to a connection."""
        self.client = client
        self.used = client.used
        self._channel: Channel | None = None
        self._receiver: Receiver | None = None
        self._method = ""

    def begin(self, receiver: Receiver, outgoing: Outgoing) -> int:
        """Send a request head and read the response to it; return the size of the head."""
        client, self._receiver, self._method = self.client, receiver, outgoing.method
        fields = http2.request_fields(
            outgoing.method, outgoing.line, outgoing.headers, outgoing.body, trailers=outgoing.trailers
        )
        whole = outgoing.body.framing == "none" or outgoing.body == Body("length", 0)
        try:
            if client.leaving_now():
                raise ConnectionResetError
            number = client.machine.get_next_available_stream_id()
            client.machine.send_headers(number, fields, end_stream=whole)
        except (H2Error, OSError):
            self._fail("the server closed the connection")
            return 0
        client.used = True
        self._channel = channel = Channel(client, number, self)
        channel.sent = whole
        client.channels[number] = channel
        client.soon()
        channel.listen(lambda paused: receiver.on_pressure(paused=paused))
        return sum(len(name) + len(value) for name, value in fields)

    def write_body(self, data: bytes) -> None:
        """Send a piece of the request body."""
        if self._channel is not None:
            self._channel.write(data)

    def end_body(self, trailers: Headers) -> None:
        """Send the end of the request body."""
        if self._channel is not None and not self._channel.sent:
            self._channel.end(http2.trailer_fields(trailers))

    def pause(self, paused: bool) -> None:
        """Stop or go on reading the response."""
        if self._channel is not None:
            self._channel.pause(paused=paused)

    def close(self) -> None:
        """Give the stream up; the connection stays for others."""
        self._receiver = None
        if self._channel is not None:
            self._channel.reset()

    def release(self) -> asyncio.Transport | None:
        """Return nothing: a stream is no connection, and no switch is ever asked for on one."""
        return None

    # The channel's taker.

    def on_head(self, fields: Headers, *, ended: bool) -> None:
        """Take the head of a response, or an interim one."""
        try:
            status, headers, body = http2.read_response(fields, self._method, ended=ended)
        except HttpError as error:
            self._fail(f"the server's answer is no valid HTTP/2: {error.explanation}")
            return
        if self._receiver is None:
            return
        if status < 200:  # noqa: PLR2004 - interim
            self._receiver.on_interim(status, b"", headers)
        else:
            self._receiver.on_response(status, b"", headers, body)

    def on_data(self, data: bytes) -> None:
        """Take a piece of the response body."""
        if self._receiver is not None:
            self._receiver.on_response_body(data)

    def on_end(self, trailers: Headers) -> None:
        """Take its end."""
        receiver, self._receiver = self._receiver, None
        if self._channel is not None and not self._channel.sent:
            self._channel.reset(
                ErrorCodes.NO_ERROR
            )  # an answer that came early: the rest of the body has no place to go
        if receiver is None:
            return
        try:
            http1.check_headers(trailers)
        except HttpError as error:
            receiver.on_failure(HttpError("bad-gateway", error.explanation))
            return
        receiver.on_response_end(trailers)

    def on_reset(self, *, processed: bool) -> None:  # noqa: ARG002 - nothing was answered, which is what counts
        """The server gave the stream up."""
        self._fail("the server broke the stream off")

    def _fail(self, why: str) -> None:
        """Report once that no complete response will come."""
        receiver, self._receiver = self._receiver, None
        if self._channel is not None:
            self._channel.reset()
        if receiver is not None:
            receiver.on_failure(HttpError("bad-gateway", why))
