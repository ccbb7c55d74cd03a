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
_TOO_MANY = 429


NO_MODEL = "model-not-allowed"
"""The reason of a refusal because of the model's name."""


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


def status(shape: Shape, refusal: Refusal) -> int:
    """Return the status in which a client of this shape understands a refusal.

    Measured with Codex 0.169.0: it sends a request again five times for any 403, and for no 404 with OpenAI's own code.
    """
    return 404 if shape == "responses" and refusal.reason == NO_MODEL else refusal.status


def body(shape: Shape, refusal: Refusal, now: float = 0.0) -> bytes:
    """Return the JSON body of a refusal; `now` is wall time, for clients that are told a time instead of a delay."""
    text = f"cloister: {refusal.message}"
    if shape == "anthropic":
        kind = _ANTHROPIC_TYPES.get(refusal.status, "api_error")
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": text}})
    fallback = "server_error" if refusal.status >= _SERVER_ERROR else "invalid_request_error"
    kind = _OPENAI_TYPES.get(refusal.status, fallback)
    error: dict[str, object] = {"message": text, "type": kind, "param": None, "code": refusal.reason}
    if shape == "responses":
        error |= _for_codex(refusal, now)
    return msgspec.json.encode({"error": error})


def _for_codex(refusal: Refusal, now: float) -> dict[str, object]:
    """Return what replaces parts of an error for clients of Responses, so that Codex says it and stops.

    Measured with 0.169.0: it waits for as long as Retry-After says, an hour too, unless the type is the one below.
    """
    if refusal.reason == NO_MODEL:
        return {"type": "invalid_request_error", "code": "model_not_found"}
    if refusal.status != _TOO_MANY or refusal.again:
        return {}
    found: dict[str, object] = {"type": "usage_limit_reached"}
    if now and refusal.retry_after_s is not None:
        found["resets_at"] = int(now) + refusal.retry_after_s
    return found


def response(
    shape: Shape, refusal: Refusal, *, close: bool = False, head_only: bool = False, now: float = 0.0
) -> bytes:
    """Return a whole HTTP/1.1 response for a refusal; `now` as in `body`."""
    content, code = body(shape, refusal, now), status(shape, refusal)
    lines = [
        f"HTTP/1.1 {code} {_PHRASES.get(code, 'Error')}",
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
