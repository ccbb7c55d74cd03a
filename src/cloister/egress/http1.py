"""HTTP/1.1 heads: what is accepted from a client or server, and how it is written again.

The relay parses with llhttp and never passes a head on as it came. What leaves is built here
from checked parts, with exactly one framing of our own, so that two readers cannot disagree
about where a message ends (RFC 9112, section 11.2). Header values are passed on untouched;
hop-by-hop fields are not (RFC 9110, section 7.6.1). Nothing here reads a socket.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from cloister.egress.hosts import Host, HostError, parse_authority

Headers = list[tuple[bytes, bytes]]
Framing = Literal["none", "length", "chunked", "close"]

_TOKEN = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_TARGET = re.compile(r"[\x21-\x7e]+")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_HTTPS_PORT = 443
_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", re.DOTALL)

HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"proxy-authenticate",
        b"proxy-authentication-info", b"te", b"transfer-encoding", b"upgrade", b"http2-settings",
    }
)  # fmt: skip
"""Fields that concern one connection; they are read here and never passed on."""

_CONNECTION = frozenset({b"connection", b"proxy-connection"})
_OURS_IN_REQUESTS = HOP_BY_HOP | {b"host", b"content-length"}
_OURS_IN_RESPONSES = HOP_BY_HOP | {b"content-length"}
# RFC 9110, section 6.5.1: fields that would change framing, routing or authority after the fact.
_NEVER_IN_TRAILERS = _OURS_IN_REQUESTS | {
    b"authorization", b"cookie", b"set-cookie", b"content-encoding", b"content-range", b"content-type", b"trailer",
    b"expect", b"range", b"www-authenticate", b"cache-control", b"max-forwards",
}  # fmt: skip
_NO_BODY_STATUS = frozenset({204, 304})


class HttpError(Exception):
    """A message that is refused, with a reason for the client and a sentence."""

    def __init__(self, reason: str, explanation: str) -> None:
        """Keep both; `denial.STATUS_OF_REASON` has the status."""
        super().__init__(explanation)
        self.reason = reason
        self.explanation = explanation


class Body(NamedTuple):
    """How the body of a message is delimited; `length` counts for `length` only."""

    framing: Framing
    length: int = 0


class RequestLine(NamedTuple):
    """Where a request goes, and the origin-form target to send there."""

    host: Host
    port: int
    target: str
    default_port: int = 80
    """The port of the scheme, which is left out of Host."""

    @property
    def authority(self) -> str:
        """The value of Host."""
        if self.port == self.default_port and ":" not in self.host.text:
            return self.host.text
        return self.host.authority(self.port)


def parse_absolute(method: str, url: bytes) -> RequestLine:
    """Read an absolute-form request target (RFC 9112, section 3.2.2), `http` only.

    Raises:
        HttpError: for every other form or scheme.
    """
    text = _visible(url)
    match = _ABSOLUTE.fullmatch(text)
    if match is None:
        raise HttpError("bad-request", "this is a proxy: the request line needs the whole URL, as in GET http://host/")
    scheme, authority, rest = match[1].lower(), match[2], match[3]
    if scheme != "http":
        raise HttpError("bad-request", f"{scheme}:// is reached through CONNECT, not through an absolute URL")
    if "#" in rest:
        raise HttpError("bad-request", "a request target holds no fragment")
    try:
        host, port = parse_authority(authority, 80)
    except HostError as error:
        raise HttpError("host-invalid", error.explanation) from None
    if not rest.startswith("/"):
        rest = "*" if not rest and method == "OPTIONS" else "/" + rest
    return RequestLine(host, port, rest)


def parse_origin(method: str, url: bytes, authorities: list[bytes], host: Host, port: int) -> RequestLine:
    """Read the target of a request inside TLS (RFC 9112, section 3.2) that was opened for one host.

    Args:
        method: the request's method.
        url: its target in origin form, or an absolute `https` URL.
        authorities: the values of Host, or of `:authority`; every one must name the host of the connection.
        host: the host that TLS was opened for.
        port: its port.

    Raises:
        HttpError: `host-mismatch` where another host is named (domain fronting), else `bad-request`.
    """
    text = _visible(url)
    absolute = _ABSOLUTE.fullmatch(text) if not text.startswith("/") else None
    if absolute is not None:
        if absolute[1].lower() != "https":
            raise HttpError("bad-request", "a request inside TLS has the scheme https")
        authorities = [*authorities, absolute[2].encode()]
        text = absolute[3] if absolute[3].startswith("/") else "/" + absolute[3]
    if "#" in text or not (text.startswith("/") or (text == "*" and method == "OPTIONS")):
        raise HttpError("bad-request", "the request target must be a path")
    if not authorities:
        raise HttpError("bad-request", "the request names no host")
    for authority in authorities:
        try:
            named = parse_authority(authority.decode("latin-1"), port)
        except HostError as error:
            raise HttpError("host-invalid", error.explanation) from None
        if named != (host, port):
            why = f"the connection is for {host.authority(port)}, the request for {named[0].authority(named[1])}"
            raise HttpError("host-mismatch", why)
    return RequestLine(host, port, text, _HTTPS_PORT)


def parse_connect(url: bytes) -> tuple[Host, int]:
    """Read the authority-form target of CONNECT (RFC 9112, section 3.2.3); the port is required.

    Raises:
        HttpError: when it is no `host:port`.
    """
    try:
        return parse_authority(_visible(url))
    except HostError as error:
        raise HttpError("host-invalid", error.explanation) from None


def request_body(headers: Headers, version: str) -> Body:
    """Return how the body of a request is delimited (RFC 9112, section 6.3).

    Raises:
        HttpError: when lengths are repeated, both framings are given, or the coding is not just chunked.
    """
    body = _declared(headers, version)
    return Body("none") if body is None else body


def response_body(status: int, method: str, headers: Headers, version: str) -> Body:
    """Return how the body of a response is delimited; without any length it ends with the connection.

    Raises:
        HttpError: as `request_body`; the server's answer is then not passed on.
    """
    declared = _declared(headers, version)
    if method == "HEAD" or status in _NO_BODY_STATUS or status < 200:  # noqa: PLR2004 - interim
        return Body("none")
    return Body("close") if declared is None else declared


def check_headers(headers: Headers) -> None:
    """Check names and values once more, whatever the parser let through.

    Raises:
        HttpError: for a name that is no token or a value with control characters.
    """
    if not headers:
        return
    names = [name for name, _ in headers]
    values = b"".join([value for _, value in headers])
    # All at once: a name is a token when it is not empty and holds only what tokens hold.
    if not all(names) or not _TOKEN.fullmatch(b"".join(names)) or _BAD_VALUE.search(values):
        raise HttpError("bad-request", "a header field is malformed")


def is_token(text: bytes) -> bool:
    """Say whether this could be a method (RFC 9110, section 5.6.2)."""
    return _TOKEN.fullmatch(text) is not None


def check_target(target: str) -> None:
    """Check an origin-form target that was built, not parsed.

    Raises:
        HttpError: when it holds anything but visible ASCII, or is no path.
    """
    if not _TARGET.fullmatch(target) or not (target.startswith("/") or target == "*"):
        raise HttpError("bad-request", "the request target must be a path")


def wants_websocket(headers: Headers) -> bool:
    """Say whether a request asks to switch to WebSocket (RFC 6455); no other switch is offered (not h2c)."""
    asked = [value.strip().lower() for name, value in headers if len(name) == 7 and name.lower() == b"upgrade"]  # noqa: PLR2004
    return asked == [b"websocket"] and b"upgrade" in connection_tokens(headers)


def connection_tokens(headers: Headers) -> set[bytes]:
    """Return the tokens of all Connection fields in lower case."""
    found = [value for name, value in headers if len(name) in {10, 16} and name.lower() in _CONNECTION]
    if not found:
        return set()
    values = b",".join(found)
    return {token.strip().lower() for token in values.split(b",") if token.strip()}


def request_head(method: str, line: RequestLine, headers: Headers, body: Body, *, websocket: bool = False) -> bytes:
    """Write a request head for the server: our Host, our framing, the client's other fields in their order."""
    drop = _OURS_IN_REQUESTS | connection_tokens(headers)
    parts = [f"{method} {line.target} HTTP/1.1\r\nHost: {line.authority}\r\n".encode("ascii")]
    parts += [b"%b: %b\r\n" % field for field in headers if field[0].lower() not in drop]
    if websocket:
        parts.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
    parts.append(framing_fields(body))
    parts.append(b"\r\n")
    return b"".join(parts)


class ResponseHead(NamedTuple):
    """A response head to be written for the client; `body` is the framing towards the client."""

    status: int
    phrase: bytes
    headers: Headers
    body: Body
    close: bool = False
    """Say that the connection ends after this response."""
    keep_length: bool = False
    """Pass Content-Length on although no body follows (HEAD, 304)."""
    websocket: bool = False
    """Confirm a switch to WebSocket."""

    def encode(self) -> bytes:
        """Write it: the server's fields in their order, without hop-by-hop ones, and our framing."""
        drop = _OURS_IN_RESPONSES | connection_tokens(self.headers)
        if self.keep_length:
            drop -= {b"content-length"}
        clean = b"" if _BAD_VALUE.search(self.phrase) else self.phrase
        parts = [b"HTTP/1.1 %d %b\r\n" % (self.status, clean)]
        parts += [b"%b: %b\r\n" % field for field in self.headers if field[0].lower() not in drop]
        if self.websocket:
            parts.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
        elif self.close:
            parts.append(b"Connection: close\r\n")
        parts += [framing_fields(self.body), b"\r\n"]
        return b"".join(parts)


def framing_fields(body: Body) -> bytes:
    """Return the one header field that delimits a body, or nothing."""
    if body.framing == "length":
        return b"Content-Length: %d\r\n" % body.length
    return b"Transfer-Encoding: chunked\r\n" if body.framing == "chunked" else b""


def chunk(data: bytes) -> bytes:
    """Return one chunk; empty data gives nothing, since an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def last_chunk(trailers: Headers) -> bytes:
    """Return the end of a chunked body with the trailers that may be passed on."""
    return b"0\r\n" + b"".join(b"%b: %b\r\n" % field for field in kept_trailers(trailers)) + b"\r\n"


def kept_trailers(trailers: Headers) -> Headers:
    """Return the trailers that may be passed on."""
    return [field for field in trailers if field[0].lower() not in _NEVER_IN_TRAILERS]


def parse_proxy_reply(data: bytes | bytearray) -> tuple[int, int] | None:
    """Read an upstream proxy's answer to our CONNECT; return its status and size, or None while incomplete.

    Raises:
        HttpError: when it is longer than 16 KiB or is no HTTP answer.
    """
    end = data.find(b"\r\n\r\n", 0, 16 * 1024)
    if end < 0:
        if len(data) >= 16 * 1024:
            raise HttpError("upstream-proxy-failed", "the upstream proxy's answer is too long")
        return None
    match = re.match(rb"HTTP/1\.[01] ([1-5][0-9]{2})[ \r]", data)
    if match is None:
        raise HttpError("upstream-proxy-failed", "the upstream proxy's answer is no HTTP")
    return int(match[1]), end + 4


def _declared(headers: Headers, version: str) -> Body | None:
    """Return the framing the fields declare, or None when they declare none."""
    lengths, codings = [], []
    for name, value in headers:
        size = len(name)
        if size == 14 and name.lower() == b"content-length":  # noqa: PLR2004 - the length of the name, read first
            lengths.append(value.strip())
        elif size == 17 and name.lower() == b"transfer-encoding":  # noqa: PLR2004
            codings.append(value.strip().lower())
    if codings:
        if lengths or codings != [b"chunked"] or version != "1.1":
            raise HttpError("bad-request", "the body is delimited in a way that readers disagree about")
        return Body("chunked")
    if not lengths:
        return None
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise HttpError("bad-request", "Content-Length is repeated or is no number")
    return Body("length", int(lengths[0]))


def _visible(url: bytes) -> str:
    """Decode a request target that is made of visible ASCII only."""
    text = url.decode("latin-1")
    if not _TARGET.fullmatch(text):
        raise HttpError("bad-request", "the request target holds characters that belong escaped")
    return text
