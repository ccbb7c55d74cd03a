"""The server's side of HTTP/1.1: one connection, one request at a time, responses read with llhttp.

A response is taken apart and given to a receiver in pieces; nothing is passed on as it came.
A response that breaks off is reported as such, never as complete. Which server, and whether
it may be talked to, is decided elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import httptools

from cloister.egress import http1
from cloister.egress.http1 import Body, Headers, HttpError
from cloister.relay.connection import callback_error
from cloister.relay.exchange import SMALL
from cloister.relay.override import override
from cloister.relay.tunnel import as_transport
from cloister.relay.whole_answer import WholeAnswer, read_whole

_MAX_HEAD, _MAX_PHRASE = 256 * 1024, 8192
_TOGETHER = 128 * 1024
"""Bodies below this are copied behind their head, which saves a write."""
_SWITCHING, _FIRST_FINAL = 101, 200


class Receiver(Protocol):
    """Takes a response."""

    def on_interim(self, status: int, phrase: bytes, headers: Headers) -> None:
        """Take a 1xx response."""

    def on_response(self, status: int, phrase: bytes, headers: Headers, body: Body) -> None:
        """Take the head."""

    def on_response_body(self, data: bytes) -> None:
        """Take a piece of the body."""

    def on_response_end(self, trailers: Headers) -> None:
        """Take the end. The connection may be used again if `reusable`."""

    def on_switch(self, phrase: bytes, headers: Headers, rest: bytes) -> None:
        """Take a 101 answer: from here on the connection carries another protocol."""

    def on_failure(self, error: HttpError) -> None:
        """Take the news that no (complete) response will come."""

    def on_pressure(self, *, paused: bool) -> None:
        """Stop or go on sending the body."""


class HttpUpstream(asyncio.Protocol):
    """One connection to a server."""

    def __init__(self) -> None:
        """Wait for the connection."""
        self.transport: asyncio.Transport | None = None
        self.reusable = True
        self.used = False
        self._feeding = self._full = False
        self._stopped = False
        self._whole: Callable[[WholeAnswer], None] | None = None
        self._receiver: Receiver | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._phrase = bytearray()
        self._fields: Headers = []
        self._field_bytes = 0
        self._body: Body | None = None
        self._interim = self._surplus = self._chunked = self._sending = self._websocket = False
        self._method = ""
        self._silent = 0  # bytes since the last callback: llhttp keeps an unfinished field in memory
        self._pieces: list[bytes] = []
        """Of the body, from one read: a stream's many small chunks that came together go on together."""

    @property
    def idle(self) -> bool:
        """Whether another request may be sent."""
        usable = self.transport is not None and not self.transport.is_closing()
        return usable and self.reusable and self._receiver is None and not self._feeding

    def begin(  # noqa: PLR0913 - a request, and how its answer is taken
        self, receiver: Receiver, method: str, head: bytes, body: Body, *, websocket: bool = False,
        whole: Callable[[WholeAnswer], None] | None = None,
    ) -> None:  # fmt: skip
        """Send a request head and read the response to it.

        Args:
            receiver: takes the response in pieces.
            method: the request's.
            head: as it goes over the wire, with the body behind it where that is short.
            body: how the rest of the body is framed.
            websocket: whether the server may switch to WebSocket.
            whole: takes an ordinary response that came in one read, in place of the receiver.
        """
        self._receiver, self._method, self._websocket = receiver, method, websocket
        self._whole = whole
        self._chunked = body.framing == "chunked"
        self._sending = True  # until end_body
        self._begin_response()
        if self._stopped:
            self.pause(False)
        receiver.on_pressure(paused=self._full)
        self.write(head)

    def ask(
        self, receiver: Receiver, method: str, head: bytes, content: bytes,
        whole: Callable[[WholeAnswer], None] | None = None,
    ) -> None:  # fmt: skip
        """Send a whole request, in one write where it is short, and read the response to it; see `begin`."""
        together = len(content) < _TOGETHER
        start = head + content if together else head
        self.begin(receiver, method, start, Body("length", len(content)), whole=whole)
        if not together:
            self.write_body(content)
        self.end_body([])

    def write(self, data: bytes) -> None:
        """Write to the server, if it is still there."""
        if self.transport is not None:
            self.transport.write(data)

    def write_body(self, data: bytes) -> None:
        """Send a piece of the request body."""
        if not self._chunked:
            self.write(data)
        elif len(data) < SMALL:
            self.write(http1.chunk(data))
        else:
            self.write(b"%x\r\n" % len(data))
            self.write(data)
            self.write(b"\r\n")

    def end_body(self, trailers: Headers) -> None:
        """Send the end of the request body."""
        self._sending = False
        if self._chunked:
            self.write(http1.last_chunk(trailers))

    def close(self) -> None:
        """Close; nobody waits for a response any more."""
        self._receiver = None
        if self.transport is not None:
            self.transport.abort()

    def pause(self, paused: bool) -> None:
        """Stop or go on reading the response."""
        if paused is not self._stopped and self.transport is not None and not self.transport.is_closing():
            self._stopped = paused
            if paused:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def release(self) -> asyncio.Transport | None:
        """Give the transport away (WebSocket)."""
        transport, self.transport, self._receiver = self.transport, None, None
        return transport

    # The transport's side.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Bound the buffer."""
        self.transport = as_transport(transport)

    @override
    def data_received(self, data: bytes) -> None:
        """Parse; a server that speaks out of turn is cut off."""
        if self._receiver is None:
            self.close()
            return
        if self._whole is not None:
            whole, self._whole = self._whole, None
            if not self._sending and self._method != "HEAD" and (answer := read_whole(data)) is not None:
                self._receiver = None
                self.used = True
                whole(answer)
                return
        self._feeding = True
        self._silent += len(data)
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        try:
            self._parser.feed_data(data)
            self._pass_on()
            if self._silent > _MAX_HEAD:
                self._fail("the server's head or trailer never ends")
        except httptools.HttpParserUpgrade as upgrade:
            self._switch(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            # Bytes after a complete response are the server's mistake, not the client's business.
            self._pass_on()
            callback = isinstance(error, httptools.HttpParserCallbackError)
            why = callback_error(asyncio.get_running_loop(), error) if callback else error
            self._fail(f"the server's answer is no valid HTTP/1.1: {why}")
            self.reusable = False
        finally:
            self._feeding = False
        if self._surplus:
            self.close()

    @override
    def eof_received(self) -> bool:
        """End a body that is delimited by the end of the connection."""
        self.reusable = False
        if self._receiver is not None and self._body is not None and self._body.framing == "close":
            self._finish()
        else:
            self._fail("the server closed the connection before its answer was complete")
        return False

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Report a response that will not come."""
        self.transport, self.reusable = None, False
        self._fail("the server reset the connection" if exc else "the server closed the connection")

    @override
    def pause_writing(self) -> None:
        """The server reads slowly."""
        self._full = True
        if self._receiver is not None:
            self._receiver.on_pressure(paused=True)

    @override
    def resume_writing(self) -> None:
        """The server goes on."""
        self._full = False
        if self._receiver is not None:
            self._receiver.on_pressure(paused=False)

    # llhttp's callbacks.

    def on_status(self, phrase: bytes) -> None:
        """Collect the reason phrase."""
        self._silent = 0
        if len(self._phrase) > _MAX_PHRASE:
            raise HttpError("bad-gateway", "the reason phrase never ends")
        self._phrase += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header or trailer field."""
        self._silent = 0
        self._fields.append((name, value))
        self._field_bytes += len(name) + len(value)
        if self._field_bytes > _MAX_HEAD:
            raise HttpError("bad-gateway", "the head is too large")

    def on_headers_complete(self) -> None:
        """Pass the head on."""
        if self._receiver is None or self._parser is None:
            return
        status, fields = self._parser.get_status_code(), self._fields
        http1.check_headers(fields)
        body = http1.response_body(status, self._method, fields, self._parser.get_http_version())
        if status == _SWITCHING:
            if not self._websocket or not http1.wants_websocket(fields):
                raise HttpError("bad-gateway", "it switches to a protocol nobody asked for")
            return
        if status < _FIRST_FINAL:
            self._receiver.on_interim(status, bytes(self._phrase), fields)
            self._interim = True
            return
        self.reusable = self._parser.should_keep_alive() and body.framing != "close"
        self._body, self._fields, self._field_bytes = body, [], 0
        self._receiver.on_response(status, bytes(self._phrase), fields, body)
        if self._method == "HEAD":
            self._finish()  # llhttp would wait for the body that a HEAD response only announces

    def on_body(self, data: bytes) -> None:
        """Pass a piece of the body on."""
        self._silent = 0
        if self._receiver is not None:
            self._pieces.append(data)
        else:
            self._surplus = True  # beyond the end of the response: this server cannot be trusted with another
            self.reusable = False

    def on_message_complete(self) -> None:
        """Pass the end on; an interim response is only the beginning."""
        if self._interim:
            self._interim = False
            self._phrase.clear()
            self._fields, self._field_bytes = [], 0
        elif self._body is not None:
            self._finish()

    # Inside.

    def _begin_response(self) -> None:
        """Begin with a fresh parser, made with the first bytes that need it."""
        self._parser = None
        self._phrase.clear()
        self._fields, self._field_bytes, self._body = [], 0, None
        self._interim = self._surplus = False
        self._silent = 0
        self._pieces.clear()

    def _pass_on(self) -> None:
        """Give what came of the body to the receiver."""
        pieces = self._pieces
        if not pieces:
            return
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._receiver is not None:
            self._receiver.on_response_body(data)

    def _finish(self) -> None:
        """The response is complete."""
        self._pass_on()
        http1.check_headers(self._fields)
        receiver, self._receiver = self._receiver, None
        if self._sending:
            self.reusable = False  # the server answered early: the rest of the body has no place to go
        if receiver is not None:
            self.used = True
            receiver.on_response_end(self._fields)

    def _switch(self, rest: bytes) -> None:
        """Hand the connection over after a 101."""
        if self._receiver is not None:
            self._receiver.on_switch(bytes(self._phrase), self._fields, rest)

    def _fail(self, why: str) -> None:
        """Report once that no complete response will come."""
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.on_failure(HttpError("bad-gateway", why))
        if self.transport is not None:
            self.transport.abort()
