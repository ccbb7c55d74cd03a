"""An answer that is kept whole before the client sees any of it: another attempt may follow, or it is changed first."""

from __future__ import annotations

import email.utils
import time
from typing import TYPE_CHECKING

from cloister.egress.http1 import Body, Headers
from cloister.llm.access import Access, filter_list, own_list
from cloister.llm.errors import Refusal
from cloister.llm.routes import Shape
from cloister.relay.llm.refusing import refuse

if TYPE_CHECKING:
    from cloister.relay.exchange import Exchange

AGAIN = frozenset({429, 500, 502, 503, 504, 529})
"""Where another attempt may help."""
MAYBE_BILLED = frozenset({502, 504, 524})
"""A gateway gave up; what stands behind it may have worked on."""
_ERROR = 400
_NO_LIST = frozenset({404, 405, 501})
NOT_PASSED = frozenset({b"set-cookie", b"alt-svc", b"strict-transport-security"})
"""Fields of an answer that a client does not get: connections to an upstream are shared, cookies are not."""
_HIDDEN_LENGTHS = frozenset(map(len, NOT_PASSED))
_READ = frozenset({b"request-id", b"x-request-id", b"content-type", b"content-encoding", b"retry-after"})
_LENGTHS = frozenset(map(len, _READ))
"""A look at the length of a name spares its copy in lower case."""


class Held:
    """Head and body of one answer."""

    def __init__(self, status: int, phrase: bytes, headers: Headers, most: int) -> None:
        """Take a head; at most so many bytes of body are kept."""
        self.status, self.phrase, self.headers = status, phrase, headers
        self.body = bytearray()
        self._most = most

    @classmethod
    def of_json(cls, content: bytes) -> Held:
        """Return an answer of our own."""
        held = cls(200, b"OK", [(b"content-type", b"application/json")], len(content))
        held.body += content
        return held

    def take(self, data: bytes) -> bool:
        """Keep a piece; False when it is too much."""
        if len(self.body) + len(data) > self._most:
            return False
        self.body += data
        return True

    def give(self, exchange: Exchange) -> None:
        """Give it to a client."""
        exchange.respond(self.status, self.phrase, passed_fields(self.headers), Body("length", len(self.body)))
        exchange.respond_body(bytes(self.body))
        exchange.respond_end([])


def allowed_list(held: Held, access: Access, shape: Shape) -> Held | Refusal:
    """Return an upstream's list of models with those that are allowed; one of our own where it has none."""
    names = access.names()
    if held.status < _ERROR:
        listed = filter_list(bytes(held.body), access, shape)
        if listed is None:
            return Refusal(502, "bad-gateway", "the upstream's list of models is none")
        return Held.of_json(listed)
    if held.status in _NO_LIST and names:
        return Held.of_json(own_list(names, shape))
    return held


def give_list(held: Held, access: Access, shape: Shape, exchange: Exchange) -> None:
    """Give a client the models that are allowed, in its own protocol."""
    listed = allowed_list(held, access, shape)
    if isinstance(listed, Refusal):
        refuse(exchange, shape, listed)
    else:
        listed.give(exchange)


def known_fields(headers: Headers) -> dict[bytes, bytes]:
    """Return the fields of an answer that are read here, by their names in lower case."""
    found = {}
    for name, value in headers:
        if len(name) in _LENGTHS and (lower := name.lower()) in _READ:
            found[lower] = value
    return found


def passed_fields(headers: Headers) -> Headers:
    """Return the fields of an answer that a client gets."""
    return [field for field in headers if len(field[0]) not in _HIDDEN_LENGTHS or field[0].lower() not in NOT_PASSED]


def delay(value: bytes | None) -> float | None:
    """Return the delay that Retry-After asks for (RFC 9110, section 10.2.3), or None."""
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
