"""Client bytes through the relay's HTTP parser: cut anywhere, the same requests come out."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.egress.http1 import Body
from cloister.relay.connection import HttpConnection
from cloister.relay.exchange import Exchange
from cloister.relay.session import Limits

PIECES = [
    b"GET http://a.test/x HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST http://a.test/ HTTP/1.1\r\nContent-Length: 5\r\nX: \xff\r\n\r\nhello",
    b"POST http://a.test/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\nT: v\r\n\r\n",
    b"GET http://a.test/ HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
    b"HEAD http://b.test/ HTTP/1.0\r\n\r\n",
    b"\r\n",
    b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET / HTTP/1.1\nHost: a\n\n",
    b"CONNECT a.test:443 HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\0\xff",
    b"X" * 300,
]


class Wire(asyncio.Transport):
    """A transport that only remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = False

    def write(self, data: bytes) -> None:
        """Accept."""

    def set_write_buffer_limits(self, high=None, low=None) -> None:
        """Accept."""

    def pause_reading(self) -> None:
        """Accept."""

    def resume_reading(self) -> None:
        """Accept."""

    def can_write_eof(self) -> bool:
        """No half-close."""
        return False

    def is_closing(self) -> bool:
        """Say whether it was closed."""
        return self.closing

    def close(self) -> None:
        """Remember."""
        self.closing = True

    abort = close


class Take:
    """A sink that notes what it takes and answers at the end."""

    def __init__(self, exchange: Exchange, log: list) -> None:
        self.exchange, self.log, self.body = exchange, log, b""

    def write_body(self, data: bytes) -> None:
        """Collect."""
        self.body += data

    def end_body(self, trailers: list) -> None:
        """Note the request and answer it."""
        exchange = self.exchange
        self.log.append((exchange.method, exchange.url, exchange.headers, exchange.body, self.body, trailers))
        exchange.respond(200, b"OK", [], Body("length", 0))
        exchange.respond_end([])

    def abandon(self) -> None:
        """Ignore."""


async def requests(pieces: list[bytes]) -> list:
    """Feed pieces and return what came out: complete requests, then the refusal if there was one."""
    log: list = []

    def refuse(_connection, error):
        log.append(error.reason)
        return b""

    connection = HttpConnection(Limits(head_bytes=1000), lambda exchange: exchange.attach(Take(exchange, log)), refuse)
    connection.connection_made(Wire())
    for piece in pieces:
        connection.data_received(piece)
        for _ in range(3):
            await asyncio.sleep(0)
    for _ in range(40):
        await asyncio.sleep(0)
    return log


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=12), max_size=5).map(b"".join), st.data())
def test_cutting_the_bytes_changes_nothing(stream, data):
    """One read, many reads, or byte by byte: the same requests with the same bodies, and the same refusal."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if a != b]

    async def all_ways():
        return [await requests(way) for way in (pieces, [stream], [bytes([byte]) for byte in stream])]

    split, whole, single = asyncio.run(all_ways())
    assert split == whole == single
