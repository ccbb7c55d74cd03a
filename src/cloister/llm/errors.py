"""Refusals and broken streams in the shapes that clients of each protocol understand. Pure: bytes come out.

A refusal carries a machine-readable reason twice: in `x-cloister-reason`, and where the protocol has a place for it.
Clients built on the providers' own libraries obey `Retry-After` and `x-should-retry`.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from cloister.llm.routes import Shape

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_PHRASES = {
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 408: "Request Timeout",
    413: "Content Too Large", 426: "Upgrade Required", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip
_SERVER_ERROR = 500


class Refusal(NamedTuple):
    """Why a request is not served."""

    status: int
    reason: str
    """Kebab-case, part of the interface."""
    message: str
    """A sentence for the agent and its owner, with what would help."""
    retry_after_s: int | None = None
    """Seconds after which the same request may be served."""
    again: bool = True
    """Whether a client should try by itself at all."""


def body(shape: Shape, refusal: Refusal) -> bytes:
    """Return the JSON body of a refusal."""
    text = f"cloister: {refusal.message}"
    if shape == "anthropic":
        kind = _ANTHROPIC_TYPES.get(refusal.status, "api_error")
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": text}})
    fallback = "server_error" if refusal.status >= _SERVER_ERROR else "invalid_request_error"
    kind = _OPENAI_TYPES.get(refusal.status, fallback)
    return msgspec.json.encode({"error": {"message": text, "type": kind, "param": None, "code": refusal.reason}})


def response(shape: Shape, refusal: Refusal, *, close: bool = False, head_only: bool = False) -> bytes:
    """Return a whole HTTP/1.1 response for a refusal."""
    content = body(shape, refusal)
    lines = [
        f"HTTP/1.1 {refusal.status} {_PHRASES.get(refusal.status, 'Error')}",
        "content-type: application/json",
        f"content-length: {len(content)}",
        "cache-control: no-store",
        f"x-cloister-reason: {refusal.reason}",
    ]
    if refusal.retry_after_s is not None:
        lines.append(f"retry-after: {max(1, refusal.retry_after_s)}")
    if not refusal.again:
        lines.append("x-should-retry: false")
    if close:
        lines.append("connection: close")
    head = "\r\n".join(lines).encode("ascii") + b"\r\n\r\n"
    return head if head_only else head + content


def stream_end(shape: Shape, refusal: Refusal) -> bytes:
    """Return the server-sent event that ends a stream which broke off."""
    text = f"cloister: {refusal.message}"
    if shape == "responses":
        data = msgspec.json.encode({"type": "error", "code": refusal.reason, "message": text, "param": None})
        return b"event: error\ndata: %b\n\n" % data
    name = b"event: error\n" if shape == "anthropic" else b""
    return b"%bdata: %b\n\n" % (name, body(shape, refusal))
