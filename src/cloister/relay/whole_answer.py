"""An ordinary answer that came in one read: taken apart at once, without llhttp and without a call for each field.

Ordinary is: HTTP/1.1, status 2xx with a body, one Content-Length that ends where the bytes end, no field
twice, nothing that says how the connection goes on. The grammar is narrower than llhttp's and than RFC 9112: no
folded lines, no space around a name or behind a value. Everything else, streams and errors among it, is left to the
general path, which then reads the same bytes from their beginning.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cloister.egress.http1 import HOP_BY_HOP, Headers

MOST = 16 * 1024
"""A longer head is read by the general path, which has bounds of its own."""
_NAME = rb"[A-Za-z0-9!#$%&'*+.^_`|~-]++"
_VALUE = rb"(?:[^\x00-\x20\x7f](?:[^\x00-\x08\x0a-\x1f\x7f]*+(?<![ \t]))?)?+"
_HEAD = re.compile(
    rb"HTTP/1\.1 (2[0-9][0-9]) ([^\x00-\x08\x0a-\x1f\x7f]*+)\r\n((?:" + _NAME + rb": ?+" + _VALUE + rb"\r\n)++)\r\n"
)
_FIELD = re.compile(rb"(" + _NAME + rb"): ?+([^\r]*+)\r\n")
_DIGITS = 18
_NO_CONTENT = b"204"
_LEFT_TO_LLHTTP = (HOP_BY_HOP - {b"connection", b"keep-alive"}) | {b"trailer"}
_OURS = frozenset({b"connection", b"keep-alive", b"content-length"})
_KEPT_ALIVE = frozenset({None, b"keep-alive", b"Keep-Alive"})


class WholeAnswer(NamedTuple):
    """A complete answer."""

    status: int
    phrase: bytes
    headers: Headers
    named: dict[bytes, bytes]
    """The fields by their names in lower case, in the same order."""
    content: bytes


def read_whole(data: bytes) -> WholeAnswer | None:
    """Return the answer that these bytes are, or None where the general path has to look."""
    found = _HEAD.match(data, 0, MOST)
    if found is None:
        return None
    headers = _FIELD.findall(found[3])
    named = {name.lower(): value for name, value in headers}
    length = named.get(b"content-length", b"")
    begin = found.end()
    if (
        len(named) != len(headers)
        or not length.isdigit()
        or len(length) > _DIGITS
        or int(length) != len(data) - begin
        or found[1] == _NO_CONTENT
        or not named.keys().isdisjoint(_LEFT_TO_LLHTTP)
        or named.get(b"connection") not in _KEPT_ALIVE
    ):
        return None
    return WholeAnswer(int(found[1]), found[2], headers, named, data[begin:])


def written(answer: WholeAnswer, left_out: frozenset[bytes]) -> bytes:
    """Return the answer as it goes to a client that stays: our framing, the fields in their order.

    Args:
        answer: what came.
        left_out: names in lower case of fields that the client does not get, beside those of one connection.
    """
    head = [b"HTTP/1.1 %d %b\r\n" % (answer.status, answer.phrase)]
    for field, lower in zip(answer.headers, answer.named, strict=True):
        if lower not in _OURS and lower not in left_out:
            head.append(b"%b: %b\r\n" % field)
    head.append(b"Content-Length: %d\r\n\r\n" % len(answer.content))
    head.append(answer.content)
    return b"".join(head)
