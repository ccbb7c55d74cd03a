"""The answer to a refused client: structured, immediate, and of use to a model.

HTTP gets a status, `x-cloister-reason` and a JSON body; SOCKS gets a reply code (RFC 1928).
The body says what would allow the request, so that an agent can tell its owner instead of
trying again.
"""

from __future__ import annotations

import msgspec

from cloister.egress.decision import Target, Verdict

STATUS_OF_REASON = {
    "host-invalid": 400,
    "bad-request": 400,
    "request-timeout": 408,
    "body-too-large": 413,
    "host-mismatch": 421,
    "head-too-large": 431,
    "bad-gateway": 502,
    "dns-failed": 502,
    "connect-failed": 502,
    "certificate-invalid": 502,
    "tls-failed": 502,
    "answer-coded": 502,
    "secret-unavailable": 502,
    "upstream-proxy-failed": 502,
    "too-many-connections": 503,
    "connect-timeout": 504,
}
"""Status by reason; every other reason is a 403."""

_PHRASES = {
    400: "Bad Request",
    403: "Forbidden",
    408: "Request Timeout",
    413: "Content Too Large",
    421: "Misdirected Request",
    431: "Request Header Fields Too Large",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}

SOCKS_REPLIES = {
    "dns-failed": 0x04,
    "connect-failed": 0x05,
    "connect-timeout": 0x04,
    "upstream-proxy-failed": 0x01,
    "too-many-connections": 0x01,
}
"""Reply code by reason; every other reason is 0x02, "not allowed by ruleset"."""


class DenialBody(msgspec.Struct, frozen=True):
    """The JSON body of a refusal. Keys are part of the interface."""

    error: str
    reason: str
    host: str
    port: int
    rule: str
    explanation: str
    remedy: str


def denial_status(reason: str) -> int:
    """Return the HTTP status for a reason."""
    return STATUS_OF_REASON.get(reason, 403)


def denial_response(verdict: Verdict, target: Target | None, *, head_only: bool = False, close: bool = False) -> bytes:
    """Return a whole HTTP/1.1 response for a refusal.

    Args:
        verdict: why.
        target: where to; None when the request did not say it in a readable way.
        head_only: leave the body out, for HEAD.
        close: say that the connection ends here.
    """
    status, body = denial_status(verdict.reason), denial_body(verdict, target)
    return json_response(status, body, reason=verdict.reason, head_only=head_only, close=close)


def denial_body(verdict: Verdict, target: Target | None) -> bytes:
    """Return the JSON text of a refusal."""
    status = denial_status(verdict.reason)
    return msgspec.json.encode(
        DenialBody(
            error="denied by cloister" if status == 403 else "cloister could not serve this request",  # noqa: PLR2004
            reason=verdict.reason,
            host=target.host.text if target else "",
            port=target.port if target else 0,
            rule=verdict.rule,
            explanation=verdict.explanation,
            remedy=verdict.remedy,
        )
    )


def denial_headers(reason: str) -> list[tuple[bytes, bytes]]:
    """Return the header fields of a refusal, but for its length."""
    fields = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    return [*fields, (b"x-cloister-reason", reason.encode("ascii"))]


def json_response(status: int, body: bytes, *, reason: str = "", head_only: bool = False, close: bool = False) -> bytes:
    """Return a whole HTTP/1.1 response with a JSON body."""
    lines = [f"HTTP/1.1 {status} {_PHRASES.get(status, 'OK')}", "content-type: application/json"]
    lines += [f"content-length: {len(body)}", "cache-control: no-store"]
    if reason:
        lines.append(f"x-cloister-reason: {reason}")
    if close:
        lines.append("connection: close")
    head = "\r\n".join(lines).encode("ascii") + b"\r\n\r\n"
    return head if head_only else head + body


def socks_reply_code(reason: str) -> int:
    """Return the SOCKS5 reply code for a reason."""
    return SOCKS_REPLIES.get(reason, 0x02)
