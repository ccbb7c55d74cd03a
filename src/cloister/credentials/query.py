"""Secrets in a parameter of the query, for hosts that know no better way (RFC 3986, section 3.4).

The other parameters stay byte for byte as they came: some servers sign or compare them.
"""

from __future__ import annotations

from urllib.parse import quote_from_bytes, unquote_to_bytes


def values(path: str, name: str) -> list[bytes]:
    """Return the decoded values of a parameter."""
    return [unquote_to_bytes(value.replace("+", " ")) for key, value in _pairs(path) if _decoded(key) == name]


def put(path: str, name: str, form: str, secret: bytes) -> str:
    """Return the target with exactly one parameter of that name, in the place of the first one there was."""
    bare, mark, _ = path.partition("?")
    filled = f"{encode(name.encode())}={encode(form.encode().replace(b'{secret}', secret))}"
    parts: list[str] = []
    for part in path[len(bare) + 1 :].split("&") if mark else []:
        if _decoded(part.partition("=")[0]) != name:
            parts.append(part)
        elif filled not in parts:
            parts.append(filled)
    if filled not in parts:
        parts = [*(part for part in parts if part), filled]
    return f"{bare}?{'&'.join(parts)}"


def encode(data: bytes) -> str:
    """Percent-encode everything but unreserved characters."""
    return quote_from_bytes(data, safe="")


def _pairs(path: str) -> list[tuple[str, str]]:
    _, mark, text = path.partition("?")
    parts = text.split("&") if mark else []
    return [(key, value) for key, _, value in (part.partition("=") for part in parts)]


def _decoded(key: str) -> str:
    return unquote_to_bytes(key.replace("+", " ")).decode("utf-8", "replace")
