"""One request of a client and the response to it, in pieces.

An exchange passes the request body to a sink and stops reading while the sink cannot take
more; the response is framed for the client, whatever framing the server used. It knows
nothing of policies, servers or parsing, so that model traffic can use it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from cloister.egress import http1
from cloister.egress.http1 import Body, Headers, ResponseHead

if TYPE_CHECKING:
    from cloister.relay.connection import HttpConnection
    from cloister.relay.known_head import KnownHead

_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
SMALL = 4096
_READ = Body("length")
"""Below this, a chunk is copied into one buffer; above, its frame is written separately."""


class Sink(Protocol):
    """Takes a request body."""

    def write_body(self, data: bytes) -> None:
        """Take a piece."""

    def end_body(self, trailers: Headers) -> None:
        """Take the end."""

    def abandon(self) -> None:
        """The client is gone; nothing more comes and no response is wanted."""


class Exchange:
    """One request and its response."""

    def __init__(  # noqa: PLR0913 - the parts of a head
        self, connection: HttpConnection, method: str, url: bytes, headers: Headers, version: str,
        known: KnownHead | None = None,
    ) -> None:  # fmt: skip
        """Check the head, unless it is known; such a request is complete, and `take_whole` gives its body.

        Raises:
            HttpError: when it must not be passed on.
        """
        self.connection = connection
        self.method, self.url, self.headers, self.version = method, url, headers, version
        self.known = known
        if known is None:
            http1.check_headers(headers)
            self.body = Body("none") if method == "CONNECT" else http1.request_body(headers, version)
            self.websocket = http1.wants_websocket(headers)
            self.ended = self.body.framing == "none" or self.body == Body("length", 0)
        else:
            self.body, self.websocket, self.ended = _READ, False, True
        self.keep_alive = True
        self.started = False
        self.status = 0
        self.bytes_up = self.bytes_down = 0
        """What went on to the server, with the head (an address carries data too), and what came back as body."""
        self._trailers: Headers = []
        self._early: list[bytes] = []
        self._sink: Sink | None = None
        self._chunked = False
        self.upload_paused = False
        self.on_abandon: Callable[[], object] | None = None
        """For the handler: what to do when the client goes before there is a sink."""

    @classmethod
    def again(cls, connection: HttpConnection, known: KnownHead, headers: Headers, body: bytes) -> Exchange:
        """Return a request whose head is known, and whose body is here."""
        exchange = cls(connection, known.method, known.url, headers, "1.1", known)
        exchange.body = Body("length", len(body))
        exchange._early.append(body)
        return exchange

    # What the parser calls.

    def on_body(self, data: bytes) -> None:
        """Pass a piece of the body on, or keep it until there is a sink."""
        if self._sink is not None:
            self.bytes_up += len(data)
            self._sink.write_body(data)
        else:
            self._early.append(data)

    def on_end(self, trailers: Headers) -> None:
        """Pass the end of the body on."""
        if self.ended:
            return  # known from the head
        self.ended, self._trailers = True, trailers
        if self._sink is not None:
            self._sink.end_body(trailers)

    # What the handler calls.

    def attach(self, sink: Sink) -> None:
        """Send the body to a sink, from its first byte."""
        self._sink = sink
        for data in self._early:
            self.bytes_up += len(data)
            sink.write_body(data)
        self._early.clear()
        if self.ended:
            sink.end_body(self._trailers)
        self.connection.update_reading()

    def take_whole(self, sink: Sink) -> bytes | None:
        """Return the body where it is here as a whole already, and `sink` hears of nothing but a client that leaves.

        None where it is not, or is empty: then `attach` gives it, piece by piece.
        """
        if not self.ended or len(self._early) != 1:
            return None
        body = self._early.pop()
        self.bytes_up += len(body)
        self._sink = sink
        return body

    def detach(self) -> None:
        """Take the sink away, so that a request without a body can be sent again."""
        self._sink = None

    @property
    def replayable(self) -> bool:
        """Whether the request can be sent again: it has no body and doing it twice is the same (RFC 9110, 9.2.2)."""
        return self.body.framing == "none" and self.method in _IDEMPOTENT

    @property
    def waits_for_sink(self) -> bool:
        """Whether body bytes could come that nobody would take."""
        return not self.ended and (self._sink is None or self.upload_paused)

    def pause_upload(self, *, paused: bool) -> None:
        """Stop or go on reading the body."""
        self.upload_paused = paused
        self.connection.update_reading()

    def interim(self, status: int, phrase: bytes, headers: Headers) -> None:
        """Pass a 1xx response on; HTTP/1.0 does not know them."""
        if self.version == "1.1":
            self.connection.write(ResponseHead(status, phrase, headers, Body("none")).encode())

    def respond(self, status: int, phrase: bytes, headers: Headers, body: Body, first: bytes = b"") -> None:
        """Write the response head, with the framing that fits the client; a `first` piece of body in the same write."""
        self.started, self.status = True, status
        if not self.ended:
            self.keep_alive = False
        if body.framing in {"chunked", "close"}:
            self._chunked = self.version == "1.1"
            self.keep_alive = self.keep_alive and self._chunked
            body = Body("chunked" if self._chunked else "close")
        keep_length = body.framing == "none" and status != 204  # noqa: PLR2004 - HEAD and 304 may tell a length
        head = ResponseHead(status, phrase, headers, body, close=not self.keep_alive, keep_length=keep_length)
        self.bytes_down += len(first)
        self.connection.write(head.encode() + (http1.chunk(first) if self._chunked else first))

    def respond_body(self, data: bytes) -> None:
        """Write a piece of the response body."""
        self.bytes_down += len(data)
        if not self._chunked:
            self.connection.write(data)
        elif len(data) < SMALL:
            self.connection.write(http1.chunk(data))
        else:
            self.connection.write(b"%x\r\n" % len(data))
            self.connection.write(data)
            self.connection.write(b"\r\n")

    def respond_end(self, trailers: Headers) -> None:
        """Finish the response."""
        if self._chunked:
            self.connection.write(http1.last_chunk(trailers))
        self.connection.finished(self)

    def respond_whole(self, status: int, response: bytes) -> None:
        """Write a complete response of our own; the rest of an unread body ends the connection."""
        self.started, self.status = True, status
        self.connection.write(response)
        self.keep_alive = self.keep_alive and self.ended
        self.connection.finished(self)

    def respond_all(self, status: int, response: bytes) -> None:
        """Write a complete response that came from elsewhere; `respond_end` follows when all is done."""
        self.started, self.status = True, status
        self.bytes_down += len(response)
        self.connection.write(response)

    def respond_message(self, status: int, headers: Headers, body: bytes) -> None:
        """Write a complete response of our own from its parts; the length is ours to say."""
        close = not (self.keep_alive and self.ended)
        from http import HTTPStatus

        phrase = HTTPStatus(status).phrase.encode()
        head = ResponseHead(status, phrase, headers, Body("length", len(body)), close=close)
        self.respond_whole(status, head.encode() + (b"" if self.method == "HEAD" else body))

    def fail(self) -> None:
        """Break the response off, so that the client cannot take it for complete."""
        self.connection.abort()

    def break_off(self) -> None:
        """End the connection after what was written, without the end of the body: the client sees that it is cut."""
        if self.connection.transport is not None:
            self.connection.transport.close()

    def abandon(self) -> None:
        """Tell the sink that the client is gone."""
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.abandon()
        elif self.on_abandon is not None:
            self.on_abandon()
