"""The client's side of HTTP/1.1: a connection's bytes become exchanges, one at a time.

Requests are read with llhttp and handed to a handler, the next one only after the response to
the one before is complete. Bytes after CONNECT or a WebSocket handshake are held for whoever
takes the transport over. What may be requested is for the handler to decide.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import httptools

from cloister.egress import http1
from cloister.egress.http1 import Headers, HttpError
from cloister.relay.exchange import Exchange
from cloister.relay.known_head import KnownHead, remember
from cloister.relay.override import override
from cloister.relay.session import Limits
from cloister.relay.tunnel import as_transport

_OTHERS = 8
"""After so many heads in a row that were like none before, none is remembered any more: this client varies them."""


def callback_error(loop: asyncio.AbstractEventLoop, error: Exception) -> HttpError:
    """Return the refusal that one of our parser callbacks raised; anything else is a bug, reported and refused."""
    cause = error.__context__
    if isinstance(cause, HttpError):
        return cause
    loop.call_exception_handler({"message": "a parser callback failed", "exception": cause or error})
    return HttpError("bad-request", "internal error")


class HttpConnection(asyncio.Protocol):
    """One connection of a client that speaks HTTP/1.1."""

    def __init__(
        self, limits: Limits, handle: Callable[[Exchange], None], refuse: Callable[[HttpConnection, HttpError], bytes]
    ) -> None:
        """Take what to do with a request, and with one that cannot be read (it returns the response to write)."""
        self._limits, self._handle, self._refuse = limits, handle, refuse
        self.transport: asyncio.Transport | None = None
        self.loop = asyncio.get_running_loop()
        self.current: Exchange | None = None
        self.on_lost: list[Callable[[], None]] = []
        self.upstream: object | None = None
        """For the handler: the connection to the server that the last request used."""
        self.rest = bytearray()
        """Bytes after a CONNECT or upgrade request."""
        self._queue: deque[Exchange] = deque()
        self._parsing: Exchange | None = None
        self._newest: Exchange | None = None
        self._read: Exchange | None = None
        self._done: Exchange | None = None
        self._held = False
        self._closing = False
        self._peer_done = False
        self._known: KnownHead | None = None
        self._others = 0  # heads in a row that were not the known one
        self._stopped: bool | None = None  # whether we stopped reading; None while we have not said
        self._pressed: Callable[[bool], None] | None = None
        self._full = False
        self._stamp = self.loop.time()
        self._moved = -1
        self._url = bytearray()
        self._fields: Headers = []
        self._field_bytes = self._head_bytes = 0
        self._silent = 0  # bytes since the last callback: llhttp keeps an unfinished field in memory
        self._new_parser()

    # The transport's side.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Bound the buffer."""
        self.transport = as_transport(transport)

    @override
    def data_received(self, data: bytes) -> None:
        """Parse; requests come out one by one."""
        between = self.current is None and self._parsing is None and not (self._head_bytes or self._queue)
        if between and not (self._closing or self._held):
            known = self._known
            found = known.read(data) if known is not None else None
            if known is not None and found is not None:
                self._serve_again(known, *found)
                return
        self._parse(data)
        newest = self._newest
        if between and newest is not None and newest.ended and self._others < _OTHERS and newest is not self._read:
            self._read, self._known = newest, remember(newest, data)
            self._others += 1

    def _serve_again(self, known: KnownHead, headers: Headers, body: bytes) -> None:
        """Serve a request whose head is known."""
        self._others = 0
        self.current = self._newest = self._read = exchange = Exchange.again(self, known, headers, body)
        self._moved = -1
        self._handle(exchange)

    def _parse(self, data: bytes) -> None:
        """Read what is not known."""
        if self._closing:
            return
        if self._held:
            self.rest += data
            return
        if self._parsing is None:
            if not self._head_bytes:
                self._stamp = self.loop.time()
            self._head_bytes += len(data)
        self._silent += len(data)
        try:
            self._parser.feed_data(data)
            unfinished = self._head_bytes if self._parsing is None else self._silent
            if unfinished > self._limits.head_bytes:
                raise HttpError("head-too-large", "the head of the request is too large")  # noqa: TRY301 - one handler for all
        except httptools.HttpParserUpgrade as upgrade:
            self._after_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            self._broken(callback_error(self.loop, error))
        except httptools.HttpParserError as error:
            self._broken(HttpError("bad-request", f"this is no valid HTTP/1.1: {error}"))
        except HttpError as error:
            self._broken(error)
        self.update_reading()

    @override
    def eof_received(self) -> bool:
        """Answer what was asked, then close; a body that was cut short is not passed on."""
        self._peer_done = True
        if self.current is None or not self.current.ended:
            return False
        self.update_reading()
        return True

    @override
    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the same for every cause
        """Tell whoever works for this client."""
        self.transport = None
        self._closing = True
        if self.current is not None:
            self.current.abandon()
        for callback in self.on_lost:
            callback()

    @override
    def pause_writing(self) -> None:
        """Pass pressure on to the server."""
        self._full = True
        if self._pressed is not None:
            self._pressed(True)

    @override
    def resume_writing(self) -> None:
        """Let the server go on."""
        self._full = False
        if self._pressed is not None:
            self._pressed(False)

    # What exchanges and handlers call.

    def on_pressure(self, callback: Callable[[bool], None]) -> None:
        """Set who is told when the client reads slowly, and tell how it is now."""
        self._pressed = callback
        callback(self._full)

    def write(self, data: bytes) -> None:
        """Write to the client, if it is still there."""
        if self.transport is not None:
            self.transport.write(data)

    def abort(self) -> None:
        """End at once."""
        if self.transport is not None:
            self.transport.abort()

    def finished(self, exchange: Exchange) -> None:
        """Go on with the next request, or close."""
        if exchange is not self.current:
            return
        self.current, self._pressed, self._done = None, None, exchange
        if exchange.ended:
            exchange.detach()  # exchange and sink know each other: memory would wait for the collector
        if not exchange.keep_alive or self._closing:
            self._linger(drain=not exchange.ended)
            return
        self._stamp = self.loop.time()
        if self._held and exchange is self._newest:
            self._held, rest = False, bytes(self.rest)
            self.rest.clear()
            self._new_parser()
            self.loop.call_soon(self.data_received, rest)
        if self._queue or self._peer_done or self._stopped or self._held:
            # Not at once: we may be inside a callback of the server's parser.
            self.loop.call_soon(self._next)

    def release(self) -> tuple[asyncio.Transport | None, bytes]:
        """Give the transport away, with bytes the client sent ahead (CONNECT, WebSocket)."""
        transport, self.transport = self.transport, None
        self.current, self._closing = None, True
        return transport, bytes(self.rest)

    def update_reading(self) -> None:
        """Read only while somebody takes the bytes; keep reading otherwise, to notice a client that leaves."""
        if self.transport is None or self.transport.is_closing():
            return
        waits = self.current is not None and self.current.waits_for_sink
        stop = bool(waits or self._queue or self._held) and not self._closing
        if stop != self._stopped:
            self._stopped = stop
            if stop:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def sweep(self, now: float) -> None:
        """Enforce the time limits."""
        if self.transport is None:
            return
        if self.current is not None:
            moved = self.current.bytes_up + self.current.bytes_down
            if moved != self._moved:
                self._moved, self._stamp = moved, now
            elif now - self._stamp > self._limits.idle_timeout_s:
                self.abort()
        elif self._parsing is None and self._head_bytes:
            if now - self._stamp > self._limits.head_timeout_s:
                self._broken(HttpError("request-timeout", "the head of the request did not arrive in time"))
        elif now - self._stamp > self._limits.keepalive_timeout_s:
            self.transport.close()

    # llhttp's callbacks.

    def on_url(self, url: bytes) -> None:
        """Collect the request target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header or trailer field."""
        self._silent = 0
        self._fields.append((name, value))
        self._field_bytes += len(name) + len(value) + 4
        too_large = self._field_bytes + len(self._url) > self._limits.head_bytes
        if too_large or len(self._fields) > self._limits.head_fields:
            raise HttpError("head-too-large", "the head of the request is too large")

    def on_headers_complete(self) -> None:
        """Queue the request."""
        if len(self._url) + self._field_bytes > self._limits.head_bytes:
            raise HttpError("head-too-large", "the head of the request is too large")
        method = self._parser.get_method().decode("ascii")
        exchange = Exchange(self, method, bytes(self._url), self._fields, self._parser.get_http_version())
        exchange.keep_alive = self._parser.should_keep_alive()
        if exchange.body.framing != "none" and self._parser.should_upgrade():
            # llhttp takes everything after an upgrade head for the new protocol, so this body would be
            # read as a request.
            raise HttpError("bad-request", "a request that changes the protocol has no body")
        if len(self._queue) >= self._limits.pipelined:
            raise HttpError("bad-request", "too many requests were sent ahead")
        self._fields, self._field_bytes = [], 0
        self._parsing = self._newest = exchange
        self._queue.append(exchange)
        if self.current is None:
            self._next()

    def on_body(self, data: bytes) -> None:
        """Pass body bytes to the request being read."""
        self._silent = 0
        if self._parsing is not None:
            self._parsing.on_body(data)

    def on_message_complete(self) -> None:
        """The request is complete; the next one may begin."""
        self._silent = 0
        exchange, self._parsing = self._parsing, None
        trailers, self._fields, self._field_bytes = self._fields, [], 0
        self._url.clear()
        self._head_bytes = 0
        if exchange is not None:
            http1.check_headers(trailers)
            exchange.on_end(trailers)

    # Inside.

    def _new_parser(self) -> None:
        """Begin with a fresh parser."""
        self._parser = httptools.HttpRequestParser(self)
        self._url.clear()
        self._fields = []
        self._field_bytes = self._head_bytes = 0

    def _next(self) -> None:
        """Hand the next request to the handler."""
        if self._queue and self.current is None and not self._closing:
            self.current = self._queue.popleft()
            self._moved = -1
            self._handle(self.current)
        if self.current is None and self._peer_done and self.transport is not None:
            self.transport.close()
        self.update_reading()

    def _after_upgrade(self, rest: bytes) -> None:
        """Hold what follows CONNECT or WebSocket; go on parsing when the upgrade is one we strip (h2c)."""
        newest = self._newest
        if newest is not None and (newest.method == "CONNECT" or newest.websocket) and newest is not self._done:
            self._held = True
            self.rest += rest
            return
        self._new_parser()
        if rest:
            self.data_received(rest)

    def _broken(self, error: HttpError) -> None:
        """Answer a request that cannot be read, and close; a response that has begun is broken off."""
        if self._closing:
            return
        self._queue.clear()
        if self.current is not None:
            started = self.current.started
            self.current.abandon()
            self.current, self._pressed = None, None
            if started:
                self.abort()
                return
        self.write(self._refuse(self, error))
        self._linger(drain=True)

    def _linger(self, *, drain: bool) -> None:
        """Close; when bytes of the client may still come, read them away for a moment.

        A socket closed with unread bytes resets the connection, and the answer would be lost.
        """
        self._closing = True
        transport = self.transport
        if transport is None:
            return
        if not drain:
            transport.close()
            return
        if transport.can_write_eof() and not transport.is_closing():
            transport.write_eof()
        self.update_reading()
        self.loop.call_later(self._limits.linger_s, transport.close)
