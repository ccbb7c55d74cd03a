"""HTTP/2 heads as HTTP heads: between lists of fields with `:names` and what the relay works with.

A head is taken apart and built anew in both directions, as in `http1`, so nothing that means
something in one version only reaches the other (RFC 9113, sections 8.2 and 8.3). Framing, flow
control and HPACK are for the h2 library.
"""

from __future__ import annotations

from typing import NamedTuple

from cloister.egress import http1
from cloister.egress.http1 import Body, Headers, HttpError, RequestLine

_CONNECTION_ONLY = http1.HOP_BY_HOP
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_NO_CONTENT, _NOT_MODIFIED = 204, 304


class RequestHead(NamedTuple):
    """A request as an exchange takes it; `host` stands first among the headers."""

    method: str
    url: bytes
    headers: Headers
    body: Body


def read_request(fields: Headers, *, ended: bool) -> RequestHead:
    """Take a request apart (RFC 9113, section 8.3.1); the h2 library has checked order and repetition.

    Raises:
        HttpError: when a part is missing, belongs to another scheme, or would mean something else in HTTP/1.1.
    """
    pseudo = {name: value for name, value in fields if name.startswith(b":")}
    headers = [field for field in fields if not field[0].startswith(b":")]
    http1.check_headers(headers)
    method, path = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    if not http1.is_token(method) or b":protocol" in pseudo:
        raise HttpError("bad-request", "the method is none")
    if method != b"CONNECT" and pseudo.get(b":scheme") != b"https":
        raise HttpError("bad-request", "a request inside TLS has the scheme https")
    if any(name in _CONNECTION_ONLY and name != b"te" for name, _ in headers):
        raise HttpError("bad-request", "a field of one connection has no place in HTTP/2")
    authority = pseudo.get(b":authority")
    named = [value for name, value in headers if name == b"host"]
    hosts = named if authority is None or named not in ([], [authority]) else []
    hosts = hosts if authority is None else [authority, *hosts]
    rest = [field for field in headers if field[0] != b"host"]
    body = http1.request_body(rest, "1.1")
    if ended:
        if body.length:
            raise HttpError("bad-request", "the request announces a body and has none")
        body = Body("length", 0) if method.decode() in _WITH_BODY else Body("none")
    elif body.framing == "none":
        body = Body("chunked")
    return RequestHead(method.decode(), path, [*((b"host", value) for value in hosts), *rest], body)


def request_fields(method: str, line: RequestLine, headers: Headers, body: Body, *, trailers: bool = False) -> Headers:
    """Write a request head for a server: our authority and length, the other fields in their order."""
    fields = [
        (b":method", method.encode()),
        (b":scheme", b"https"),
        (b":authority", line.authority.encode()),
        (b":path", line.target.encode()),
    ]
    fields += _kept(headers, {b"host", b"content-length"})
    if body.framing == "length":
        fields.append((b"content-length", b"%d" % body.length))
    if trailers:
        fields.append((b"te", b"trailers"))
    return fields


def read_response(fields: Headers, method: str, *, ended: bool) -> tuple[int, Headers, Body]:
    """Take a response apart: status, headers, and how its body is delimited.

    Raises:
        HttpError: when the status is no number, or a field is malformed.
    """
    status = next((value for name, value in fields if name == b":status"), b"")
    headers = [field for field in fields if not field[0].startswith(b":")]
    http1.check_headers(headers)
    if len(status) != 3 or not status.isdigit() or not 100 <= int(status) <= 599:  # noqa: PLR2004 - RFC 9110, 15
        raise HttpError("bad-request", "the status is no number")
    body = http1.response_body(int(status), method, headers, "1.1")
    if ended and body.framing in {"close", "chunked"}:
        body = Body("length", 0)
    return int(status), headers, body


def response_fields(status: int, headers: Headers, body: Body) -> Headers:
    """Write a response head for a client: fields in lower case, none of one connection only."""
    keep_length = body.framing == "length" or (body.framing == "none" and status != _NO_CONTENT)
    drop = set() if keep_length else {b"content-length"}
    fields = [(b":status", b"%d" % status), *_kept(headers, drop)]
    if body.framing == "length" and not any(name == b"content-length" for name, _ in fields):
        fields.append((b"content-length", b"%d" % body.length))
    return fields


def trailer_fields(trailers: Headers) -> Headers:
    """Return the trailers that may be passed on, in lower case."""
    return [(name.lower(), value.strip(b" \t")) for name, value in http1.kept_trailers(trailers)]


def _kept(headers: Headers, drop: set[bytes]) -> Headers:
    """Return the fields that are passed on. A value has no space around it in HTTP/2 (RFC 9113, section 8.2.1)."""
    without = _CONNECTION_ONLY | http1.connection_tokens(headers) | drop
    lowered = ((name.lower(), value.strip(b" \t")) for name, value in headers)
    return [field for field in lowered if field[0] not in without]
