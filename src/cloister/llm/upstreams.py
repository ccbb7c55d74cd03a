"""Where requests go and how their heads look there: a `[providers]` table as values. Pure; keys come in as arguments.

What a client sent is passed on field by field, values untouched and in order, but for what is ours: who is asked, how
the body ends, who we are. Credentials of the client never leave, whatever header they are in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from cloister.llm.routes import Route, query_of
from cloister.policy.model import Protocol, Provider
from cloister.policy.units import parse_duration

Headers = list[tuple[bytes, bytes]]
Auth = Literal["bearer", "x-api-key", "api-key", "sigv4", "google", "none"]

_PUBLIC = {
    "anthropic": "https://api.anthropic.com",
    "openai": "https://api.openai.com",
    "openai-responses": "https://api.openai.com",
}
_OURS = frozenset(
    {
        b"host", b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"te", b"trailer", b"upgrade",
        b"expect", b"http2-settings", b"accept-encoding", b"proxy-connection", b"proxy-authorization",
        b"proxy-authenticate", b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"cookie", b"forwarded",
        b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip", b"via", b"content-encoding",
    }
)  # fmt: skip
"""Fields of requests that are never passed on: framing, credentials, who asked, and a coding that the body, which was
read as it stands, does not have."""
_OURS_TOO = (b"x-amz-", b"x-cloister-")
_LISTS = frozenset({"anthropic-beta"})
"""Fields with a list of values: an agent's and a login's stand side by side."""
_LOGIN = ("sk-ant-oat", "ya29.")
"""How access tokens of logins begin; they go into Authorization."""
_VISIBLE = re.compile(r"[\x21-\x7e]+")


class Upstream(NamedTuple):
    """One provider, ready for use."""

    name: str
    protocol: Protocol
    scheme: Literal["http", "https"]
    host: str
    port: int
    base: str
    """Path in front of the protocol's own, without a slash at its end."""
    auth: Literal["auto"] | Auth
    region: str
    headers: tuple[tuple[str, str], ...]
    added: tuple[tuple[str, str], ...]
    """Fields that hold a list, such as `anthropic-beta`: what a login needs there beside what the agent sends."""
    deny_betas: frozenset[str]
    connect_timeout_s: float
    first_byte_timeout_s: float
    idle_timeout_s: float
    retries: int

    @property
    def authority(self) -> str:
        """The value of Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    @property
    def place(self) -> str:
        """`name (host:port)`, for people."""
        return f"{self.name} ({self.host}:{self.port})"

    def path(self, route: Route) -> str:
        """Return the path of a route here. A base that ends with the version already has it."""
        path = route.path
        if self.base.endswith("/v1"):
            path = path.removeprefix("/v1")
        return self.base + path

    def target(self, route: Route, url: bytes) -> str:
        """Return the request target of a route here, with the query of the client's own."""
        return self.path(route) + query_of(url)


def compile_upstream(name: str, provider: Provider, login_headers: Mapping[str, str] | None = None) -> Upstream:
    """Return a provider's table as an upstream; `login_headers` are what requests with its login need besides."""
    parts = urlsplit(provider.base_url or _PUBLIC[provider.protocol])
    scheme: Literal["http", "https"] = "http" if parts.scheme == "http" else "https"
    login = provider.auth == "auto" and provider.key.startswith("login:")
    headers, added = _joined(provider.headers, login_headers or {})
    return Upstream(
        name=name,
        protocol=provider.protocol,
        scheme=scheme,
        host=parts.hostname or "",
        port=parts.port or (443 if scheme == "https" else 80),
        base=parts.path.rstrip("/"),
        auth="bearer" if login else provider.auth,
        region=provider.region,
        headers=headers,
        added=added,
        deny_betas=frozenset(provider.deny_betas),
        connect_timeout_s=parse_duration(provider.connect_timeout),
        first_byte_timeout_s=parse_duration(provider.first_byte_timeout),
        idle_timeout_s=parse_duration(provider.idle_timeout),
        retries=provider.retries,
    )


def _joined(
    own: Mapping[str, str], login: Mapping[str, str]
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Return the fields that are sent as they are, and those that are added to the agent's.

    Where the policy sets a field that a login needs too, its list gets the login's values.
    """
    fields, added = dict(own), []
    spelled = {name.lower(): name for name in own}
    for name, value in login.items():
        if (mine := spelled.get(name.lower())) is not None:
            fields[mine] = _with_values(fields[mine].encode("latin-1"), value).decode("latin-1")
        elif name.lower() in _LISTS:
            added.append((name.lower(), value))
        else:
            fields[name] = value
    return tuple(fields.items()), tuple(added)


def key_field(upstream: Upstream, key: str) -> tuple[str, str] | None:
    """Return the header field that carries a key, or None where there is none or requests are signed instead.

    Raises:
        ValueError: the key cannot stand in a header; its text is not in the message.
    """
    if upstream.auth in {"sigv4", "google", "none"} or not key:
        return None
    if not _VISIBLE.fullmatch(key):
        raise ValueError("the key holds spaces, line breaks or characters that are not ASCII")
    auth = upstream.auth
    if auth == "auto":
        auth = "x-api-key" if upstream.protocol == "anthropic" and not key.startswith(_LOGIN) else "bearer"
    if auth == "bearer":
        return "Authorization", f"Bearer {key}"
    return auth, key


def request_head(  # noqa: PLR0913 - the parts of a head
    upstream: Upstream, method: str, target: str, headers: Headers, own: bytes, length: int | None
) -> bytes:
    """Write a request head.

    Args:
        upstream: whose Host and fields count.
        method: the request's method.
        target: path and query.
        headers: the client's fields.
        own: lines of ours, complete (`own_lines`): key, Host and what the policy adds.
        length: of the body; None when there is none.
    """
    return request_fields(upstream, method, target, headers, own) + length_field(length)


def request_fields(upstream: Upstream, method: str, target: str, headers: Headers, own: bytes) -> bytes:
    """Write a request head but for its end; the arguments are those of `request_head`."""
    drop = dropped(upstream, headers)
    parts = [f"{method} {target} HTTP/1.1\r\n".encode("ascii"), own]
    added = dict(upstream.added) if upstream.added else {}
    for name, value in headers:
        lower = name.lower()
        if lower in drop or lower.startswith(_OURS_TOO):
            continue
        if lower == b"anthropic-beta" and upstream.deny_betas:
            value = allowed_betas(value, upstream.deny_betas)  # noqa: PLW2901 - the same field, shorter
            if not value:
                continue
        if added and (more := added.pop(lower.decode("latin-1"), "")):
            value = _with_values(value, more)  # noqa: PLW2901 - the same field, longer
        parts.append(b"%b: %b\r\n" % (name, value))
    parts += [f"{name}: {value}\r\n".encode("ascii") for name, value in added.items()]
    return b"".join(parts)


def length_field(length: int | None) -> bytes:
    """Return the end of a request head: the length of the body, None when there is none."""
    return b"\r\n" if length is None else b"Content-Length: %d\r\n\r\n" % length


def _with_values(value: bytes, more: str) -> bytes:
    """Return a list with values that are not in it yet at its end; what was there stays byte for byte."""
    there = {one.strip() for one in value.split(b",")}
    missing = [one for one in more.encode("ascii").split(b",") if one.strip() not in there]
    return b",".join([value, *missing]) if missing else value


def own_lines(upstream: Upstream, fields: Iterable[tuple[str, str]]) -> bytes:
    """Return the lines of ours in every request head: Host, the provider's own fields, and these."""
    lines = [("Host", upstream.authority), ("Accept-Encoding", "identity"), *upstream.headers, *fields]
    return "".join(f"{name}: {value}\r\n" for name, value in lines).encode("ascii")


def dropped(upstream: Upstream, headers: Headers) -> frozenset[bytes]:
    """Return the names of fields that are not passed on, in lower case."""
    drop = _OURS
    if upstream.headers:
        drop |= {name.lower().encode("ascii") for name, _ in upstream.headers}
    for name, value in headers:
        if len(name) == 10 and name.lower() == b"connection":  # noqa: PLR2004 - its length
            drop |= {token.strip().lower() for token in value.split(b",")} - {b"content-type", b"accept"}
    return drop


def allowed_betas(value: bytes, denied: frozenset[str]) -> bytes:
    """Return a value of `anthropic-beta` without those that the upstream refuses; the rest as it was."""
    tokens = value.split(b",")
    kept = [token for token in tokens if token.strip().decode("latin-1") not in denied]
    return value if len(kept) == len(tokens) else b",".join(kept).strip()
