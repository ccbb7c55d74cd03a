"""Secrets in header fields: a field of the policy's choice, or Authorization as Bearer and Basic.

`git`, `npm` and `pip` are Basic and Bearer with the names their hosts expect. Sources: RFC 6750
(Bearer), RFC 7617 (Basic), RFC 9110 section 5.5 (what a field's value may hold).
"""

from __future__ import annotations

import base64
import re

from cloister.credentials.bindings import Binding, Headers, InjectionError

_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_AUTHORIZATION = b"authorization"


def values(binding: Binding, headers: Headers) -> list[bytes]:
    """Return what the client sent in the field that this credential goes into."""
    name = _field(binding)
    return [value for key, value in headers if key.lower() == name]


def put(binding: Binding, secret: bytes, headers: Headers) -> Headers:
    """Return the headers with exactly one field of that name, in the place of the first one there was.

    Raises:
        InjectionError: the secret holds line breaks or other control characters.
    """
    if _CONTROL.search(secret) or not secret or secret != secret.strip():
        raise InjectionError(
            "secret-unusable",
            f"the secret of {binding.name!r} is empty, or holds line breaks or control characters that no header may",
            "store the bare token, on one line",
        )
    name = _field(binding)
    where = next((index for index, (key, _) in enumerate(headers) if key.lower() == name), len(headers))
    spelled = headers[where][0] if where < len(headers) else name
    kept = [(key, value) for key, value in headers if key.lower() != name]
    at = sum(key.lower() != name for key, _ in headers[:where])
    return [*kept[:at], (spelled, _value(binding, secret)), *kept[at:]]


def _field(binding: Binding) -> bytes:
    return binding.header.lower().encode() if binding.scheme == "header" else _AUTHORIZATION


def _value(binding: Binding, secret: bytes) -> bytes:
    filled = binding.value.encode().replace(b"{secret}", secret)
    match binding.scheme:
        case "header":
            return filled
        case "basic" | "git" | "pip":
            return b"Basic " + base64.b64encode(binding.user.encode() + b":" + filled)
        case _:
            return b"Bearer " + filled
