"""Unified differences of two contents that a terminal can show: bytes in, text out.

The bytes come from an agent, so everything that is not printable is escaped (terminal control
sequences, bidirectional overrides), and what is large or not text is named instead of shown. Not a patch
format to feed to a program: escaped text does not apply.
"""

from __future__ import annotations

import difflib

MAX_BYTES = 256 * 1024
MAX_LINES = 4_000
"""difflib compares in quadratic time at worst: lines of both sides together."""
MAX_OUTPUT_LINES = 2_000


def printable(text: str) -> str:
    """Return text with every character escaped that is not printable, tabs excepted."""
    return "".join(
        char if char.isprintable() or char == "\t" else char.encode("unicode_escape").decode("ascii") for char in text
    )


def unified(path: str, old: bytes | None, new: bytes | None) -> str:
    """Return the difference for people; None stands for a file that is not there."""
    shown = printable(path)
    sizes = f"{_size(old)} to {_size(new)}"
    if old is not None and new is not None and old == new:
        return ""
    if max(len(old or b""), len(new or b"")) > MAX_BYTES:
        return f"{shown}: too large to show ({sizes})\n"
    before, after = _lines(old), _lines(new)
    if before is None or after is None:
        return f"{shown}: not text ({sizes})\n"
    if len(before) + len(after) > MAX_LINES:
        return f"{shown}: too many lines to show ({sizes})\n"
    names = ("/dev/null" if old is None else f"a/{shown}", "/dev/null" if new is None else f"b/{shown}")
    lines = list(difflib.unified_diff(before, after, *names, lineterm=""))
    if not lines:
        return f"{shown}: empty file ({'added' if old is None else 'deleted'})\n"
    out = [printable(line) for line in lines[:MAX_OUTPUT_LINES]]
    if len(lines) > MAX_OUTPUT_LINES:
        out.append(f"… {len(lines) - MAX_OUTPUT_LINES} more lines")
    return "\n".join(out) + "\n"


def _lines(data: bytes | None) -> list[str] | None:
    """Return the lines, with a mark where the last has no newline; None when it is not text."""
    if not data:
        return []
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    lines = text.split("\n")
    if lines[-1]:
        lines[-1] += "  [no newline at end of file]"
    else:
        lines.pop()
    return lines


def _size(data: bytes | None) -> str:
    return "nothing" if data is None else f"{len(data)} bytes"
