"""A request whose head was read before on its connection: what was found then holds now, and nothing is read again.

A program asks one thing after another over one connection, with heads in which only the length of the body differs.
What llhttp and our checks made of the first one is a function of its bytes, so it holds for every head that is byte
for byte the same apart from the digits of Content-Length. Who asks is still checked with every request.

Left to the general path, which is always right: the first request, any other head, a body that comes in several
reads or chunks, pipelining, HTTP/1.0, Expect, Upgrade and CONNECT.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cloister.egress.http1 import Headers

if TYPE_CHECKING:
    from cloister.relay.exchange import Exchange

MOST = 8192
"""Longer heads are read each time: what is remembered costs memory for as long as the connection stands."""
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})(?=[ \t]*\r\n)", re.IGNORECASE)
_DIGITS = 18
_UNUSUAL = frozenset({b"expect", b"upgrade", b"transfer-encoding", b"trailer"})


class KnownHead:
    """One head, and what was found in it."""

    __slots__ = ("_after", "_before", "_place", "headers", "method", "note", "url")

    def __init__(self, exchange: Exchange, before: bytes, after: bytes, place: int) -> None:
        """Keep what an exchange found; `place` is that of Content-Length among its fields."""
        self.method, self.url, self.headers = exchange.method, exchange.url, exchange.headers
        self._before, self._after, self._place = before, after, place
        self.note: object = None
        """For the handler: what it worked out from the head alone."""

    def read(self, data: bytes) -> tuple[Headers, bytes] | None:
        """Return fields and body of a request that is this head and its whole body, and nothing else; or None."""
        before, after = self._before, self._after
        if not data.startswith(before):
            return None
        start = len(before)
        end = data.find(after, start, start + _DIGITS + len(after))
        digits = data[start:end] if end > start else b""
        if not digits.isdigit():
            return None
        begin = end + len(after)
        if len(data) - begin != int(digits) or begin == len(data):
            return None
        headers = self.headers.copy()
        headers[self._place] = (headers[self._place][0], digits)
        return headers, data[begin:]


def remember(exchange: Exchange, data: bytes) -> KnownHead | None:
    """Return the head of a request to know it by; None where the next one has to be read in any case.

    Args:
        exchange: what was read.
        data: the bytes of one read, which were this request and nothing else.
    """
    if exchange.body.framing != "length" or exchange.version != "1.1" or not exchange.keep_alive:
        return None
    end = data.find(b"\r\n\r\n", 0, MOST) + 4
    if end < 4 or len(data) - end != exchange.body.length:  # noqa: PLR2004 - not found
        return None
    found = _LENGTH.findall(data, 0, end)
    names = [name.lower() for name, _ in exchange.headers]
    if len(found) != 1 or names.count(b"content-length") != 1 or not _UNUSUAL.isdisjoint(names):
        return None
    length = _LENGTH.search(data, 0, end)
    place = names.index(b"content-length")
    if length is None or exchange.headers[place][1] != length[1]:
        return None
    return KnownHead(exchange, data[: length.start(1)], data[length.end(1) : end], place)
