"""Secrets in a segment of the path, for hosts that have no better place (Telegram: `/bot<TOKEN>/sendMessage`).

Only a segment of the policy's form is touched, and only where the placeholder stands in it; all other bytes of the
target stay as they came. Sources: RFC 3986, sections 3.3 and 5.2.4; core.telegram.org/bots/api, "Making requests".
"""

from __future__ import annotations

from urllib.parse import quote_from_bytes, unquote_to_bytes

from cloister.credentials.bindings import InjectionError

_PLAIN = "!$&'()*+,;=:@"
"""What may stand in a segment as it is, besides unreserved characters (`pchar`)."""


def values(path: str, form: str) -> list[bytes]:
    """Return what stands in the place of the secret, in each segment of that form."""
    head, _, tail = form.encode().partition(b"{secret}")
    around = len(head) + len(tail)
    return [
        segment[len(head) : len(segment) - len(tail)]
        for segment in map(unquote_to_bytes, _segments(path)[0])
        if segment.startswith(head) and segment.endswith(tail) and len(segment) > around
    ]


def put(path: str, form: str, placeholder: str, secret: bytes) -> str:
    """Return the target with the secret in the place of the placeholder, in segments that are nothing else.

    Raises:
        InjectionError: `secret-no-segment`, the secret would name another place than a segment.
    """
    filled = form.encode().replace(b"{secret}", secret)
    if not secret or filled in {b".", b".."} or any(byte < 0x21 or byte == 0x7F for byte in secret):  # noqa: PLR2004
        raise InjectionError("secret-no-segment", "the secret cannot stand in a path: it is empty, or no plain text")
    wanted = form.replace("{secret}", placeholder).encode()
    segments, rest = _segments(path)
    return "/".join(encode(filled) if unquote_to_bytes(one) == wanted else one for one in segments) + rest


def encode(data: bytes) -> str:
    """Percent-encode what would end a segment or mean something else in it."""
    return quote_from_bytes(data, safe=_PLAIN)


def _segments(path: str) -> tuple[list[str], str]:
    """Return the segments of a target, and its query as it came."""
    bare, mark, query = path.partition("?")
    return bare.split("/"), mark + query
