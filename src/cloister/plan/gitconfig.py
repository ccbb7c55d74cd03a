"""git's configuration syntax, as far as finding paths in it needs: text in, `(key, value)` pairs out.

Not a validator and not git: a file git would refuse yields the pairs that can be read, because the
caller protects paths and one path too many does no harm. Syntax: git-config(1), "Syntax".
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_SECTION = re.compile(r'[ \t\r\n]*\[\s*([A-Za-z0-9.-]+)(?:\s+"((?:[^"\\]|\\.)*)")?\s*\]')
_NAME = re.compile(r"[ \t\r\n]*([A-Za-z][A-Za-z0-9-]*)[ \t]*(=?)")
_ESCAPES = {"n": "\n", "t": "\t", "b": "\b"}


def pairs(text: str) -> Iterator[tuple[str, str]]:
    """Yield `section.name` in lower case (subsections dropped) and the value, in file order."""
    section = ""
    at = 0
    while at < len(text):
        if found := _SECTION.match(text, at):
            section = found[1].lower()
            at = found.end()
        elif found := _NAME.match(text, at):
            value, at = _value(text, found.end()) if found[2] else ("true", _next_line(text, found.end()))
            yield f"{section}.{found[1].lower()}", value
        else:
            at = _next_line(text, at)


def _next_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end + 1


def _value(text: str, at: int) -> tuple[str, int]:
    """Read one value, which may be quoted and continued; return it and where the next line starts."""
    out: list[str] = []
    kept = 0  # length without trailing blanks
    quoted = False
    while at < len(text):
        char = text[at]
        at += 1
        if char == "\n":
            break
        if char == "\\" and at < len(text):
            if text[at] != "\n":
                out.append(_ESCAPES.get(text[at], text[at]))
                kept = len(out)
            at += 1
        elif char == '"':
            quoted = not quoted
        elif char in "#;" and not quoted:
            at = _next_line(text, at)
            break
        elif out or quoted or not char.isspace():
            out.append(char)
            if quoted or not char.isspace():
                kept = len(out)
    return "".join(out[:kept]), at
