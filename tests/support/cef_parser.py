r"""A strict parser of CEF, written from the implementation standard (document version 27), not from our renderer.

Seven fields divided by `|`, in which `\\` and `\|` are the only escapes; then `key=value` pairs divided by one space,
in which `\\`, `\=`, `\n` and `\r` are the only ones. Anything else is refused.
"""

from __future__ import annotations

import re

_KEY = re.compile(r"(?:^| )([A-Za-z0-9_]+)=")


class CefError(ValueError):
    """It is not CEF."""


def parse(line):
    """Return ([version, vendor, product, version, class id, name, severity], {key: value})."""
    text = line.decode("utf-8")
    if any(ord(sign) < 32 or sign in "\x7f\x85\u2028\u2029" for sign in text):
        raise CefError("a control character or a line break stands for itself")
    if not text.startswith("CEF:"):
        raise CefError("no CEF:")
    header, rest = [], text[4:]
    for _ in range(7):
        field, rest = _field(rest)
        header.append(field)
    if header[0] not in ("0", "1") or not 0 <= int(header[6]) <= 10:
        raise CefError("version or severity")
    return header, dict(_pairs(rest))


def _field(text):
    value, at = [], 0
    while at < len(text):
        if text[at] == "\\":
            if text[at + 1 : at + 2] not in ("\\", "|"):
                raise CefError(f"escape in the header: {text[at : at + 2]!r}")
            value.append(text[at + 1])
            at += 2
        elif text[at] == "|":
            return "".join(value), text[at + 1 :]
        else:
            value.append(text[at])
            at += 1
    raise CefError("a field of the header is missing")


def _pairs(text):
    seen, at = set(), 0
    while at < len(text):
        found = _KEY.match(text, at)
        if not found or found[1] in seen:
            raise CefError(f"no new key at {text[at : at + 30]!r}")
        seen.add(found[1])
        value, at = _value(text, found.end())
        yield found[1], value


def _value(text, at):
    """Return the value from here on, and where the space before the next key, or the end, is."""
    value = []
    while at < len(text):
        if text[at] == "\\":
            escape = {"\\": "\\", "=": "=", "n": "\n", "r": "\r"}.get(text[at + 1 : at + 2])
            if escape is None:
                raise CefError(f"escape in the extension: {text[at : at + 2]!r}")
            value.append(escape)
            at += 2
        elif text[at] == "=":
            raise CefError("an equals sign that is not escaped")
        elif text[at] == " " and _KEY.match(text, at):
            break
        else:
            value.append(text[at])
            at += 1
    return "".join(value), at
