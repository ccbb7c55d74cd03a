"""Printing for people and for machines: tables, times, colours, JSON.

Everything that came from an agent passes `clean` or `clean_lines` before it reaches a terminal: a
command line may hold escape sequences that retitle, repaint or type into it. Decides nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Sequence

import msgspec

_SEQUENCE = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]"  # CSI, ECMA-48 section 5.4
    "|\x1b[P\\]X^_][^\x07\x1b]*(?:\x07|\x1b\\\\)?"  # DCS, OSC, SOS, PM, APC up to their end
    "|\x1b[ -/]*[0-~]?"
)
_COLOURS = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold": "1"}
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))
_KIB = 1024


def clean(text: str) -> str:
    """Return text in which whatever is not printable is escaped: one line, and nothing a terminal obeys."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def clean_lines(text: str) -> str:
    """Return output of an agent without escape sequences and control characters; lines and tabs stay."""
    plain = _SEQUENCE.sub("", text.replace("\r\n", "\n"))
    return "".join(char for char in plain if char.isprintable() or char in "\n\t")


def is_terminal() -> bool:
    """Return whether people read the output."""
    return sys.stdout.isatty()


def colour(text: str, name: str) -> str:
    """Return text in a colour, on a terminal that has them and without NO_COLOR (https://no-color.org)."""
    if not is_terminal() or os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return text
    return f"\x1b[{_COLOURS[name]}m{text}\x1b[0m"


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def cells(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    marks = sum(unicodedata.combining(char) != 0 for char in text)
    return len(text) + wide - marks


def cut(text: str, width: int) -> str:
    """Return a text of at most `width` columns; what was cut shows as an ellipsis."""
    if cells(text) <= width:
        return text
    while text and cells(text) > width - 1:
        text = text[:-1]
    return f"{text}…"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> str:
    """Return aligned columns; the last one is cut so that no line is wider than the terminal.

    Args:
        heads: titles of the columns.
        rows: their texts, cleaned here.
        width: columns to fit into; None asks the terminal, and does not cut where there is none.
    """
    if width is None:
        width = shutil.get_terminal_size().columns if is_terminal() else 0
    lines = [list(heads), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(cells(line[column]) for line in lines) for column in range(len(heads) - 1)]
    shown = []
    for line in lines:
        text = (
            "".join(cell + " " * (size - cells(cell) + 2) for cell, size in zip(line, widths, strict=False)) + line[-1]
        )
        shown.append((cut(text, width) if width else text).rstrip())
    return "\n".join(shown)


def pairs(entries: Sequence[tuple[str, str]]) -> str:
    """Return `name  value` lines with the values one below the other; empty values are left out."""
    kept = [(name, value) for name, value in entries if value]
    size = max((len(name) for name, _ in kept), default=0)
    return "\n".join(f"{name:<{size}}  {clean(value)}" for name, value in kept)


def moment(seconds: float) -> str:
    """Return a time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def ago(seconds: float, now: float) -> str:
    """Return how long ago a time was: `3 min ago`."""
    return f"{span(max(now - seconds, 0))} ago"


def span(seconds: float) -> str:
    """Return a length of time in its largest unit: `0.3 s`, `12 s`, `3 min`, `2 h`, `5 d`."""
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f} s"  # noqa: PLR2004


def size(count: int) -> str:
    """Return bytes for people: `512 B`, `1.5 MiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < _KIB or unit == "GiB":
            return f"{int(amount)} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= _KIB
    return f"{count} B"
