"""Finds on which line each key of a policy text stands.

Only comfort depends on it: mistakes are shown with their line. It judges nothing, and it is
only given text that `tomllib` or `json` has accepted.
"""

from __future__ import annotations

import bisect
import re
import tomllib
from collections.abc import Iterator

Key = str | int
Path = tuple[Key, ...]
"""The way to a value: keys of tables and indexes of lists."""

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def key_lines(text: str, *, is_json: bool) -> Iterator[tuple[Path, int]]:
    """Yield the path of every key and list item with its line, counted from 1; stops early where it is puzzled."""
    return _Scanner(text).scan(is_json=is_json)


class _Scanner:
    """Finds the line of every key and array item in text that is known to be valid.

    JSON objects are TOML inline tables with `:` for `=` and newlines allowed, so one scanner
    does for both. Where it is puzzled it stops: a missing line costs comfort, nothing else.
    """

    _BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
    _SPACE = re.compile(r"[ \t]*")
    _STRING = re.compile(
        r'"""(?:[^"\\]|\\[\s\S]|"{1,2}(?!"))*"{3,5}'
        r"|'''(?:[^']|'{1,2}(?!'))*'{3,5}"
        r'|"(?:[^"\\\n]|\\.)*"'
        r"|'[^'\n]*'"
    )
    _PLAIN = re.compile(r"[^,\]}#\n]+")

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._breaks = [index for index, char in enumerate(text) if char == "\n"]
        self._items: dict[Path, int] = {}

    def scan(self, *, is_json: bool) -> Iterator[tuple[Path, int]]:
        """Yield every key path with its line."""
        try:
            yield from self._value(()) if is_json else self._document()
        except (IndexError, ValueError, RecursionError):
            return

    def _line(self) -> int:
        return bisect.bisect_left(self._breaks, self._at) + 1

    def _skip(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found[0]

    def _document(self) -> Iterator[tuple[Path, int]]:
        base: Path = ()
        while True:
            self._skip(self._BLANK)
            if self._at >= len(self._text):
                return
            line = self._line()
            if self._text[self._at] == "[":
                base = self._header()
                yield base, line
            else:
                path = base + self._key()
                yield path, line
                self._skip(self._SPACE)
                self._at += 1  # the equals sign
                yield from self._value(path)

    def _header(self) -> Path:
        """Read `[a.b]` or `[[a.b]]`; the latter adds an item to an array of tables."""
        double = self._text.startswith("[[", self._at)
        self._at += 2 if double else 1
        self._skip(self._SPACE)
        path: Path = ()
        keys = self._key()
        for index, key in enumerate(keys):
            path = (*path, key)
            if double and index == len(keys) - 1:
                self._items[path] = self._items.get(path, -1) + 1
            if path in self._items:
                path = (*path, self._items[path])
        self._skip(self._SPACE)
        self._at += 2 if double else 1
        return path

    def _key(self) -> tuple[str, ...]:
        """Read a dotted key; stops before the sign that follows it."""
        parts: list[str] = []
        while True:
            self._skip(self._SPACE)
            quoted = self._skip(self._STRING)
            part = tomllib.loads(f"key = {quoted}")["key"] if quoted else self._skip(BARE_KEY)
            parts.append(str(part))
            self._skip(self._SPACE)
            if self._text[self._at] != ".":
                return tuple(parts)
            self._at += 1

    def _value(self, path: Path) -> Iterator[tuple[Path, int]]:
        self._skip(self._BLANK)
        sign = self._text[self._at]
        if sign == "[":
            yield from self._array(path)
        elif sign == "{":
            yield from self._inline(path)
        elif not self._skip(self._STRING) and not self._skip(self._PLAIN):
            raise ValueError("no value here: the scanner lost its way")

    def _array(self, path: Path) -> Iterator[tuple[Path, int]]:
        self._at += 1
        index = 0
        while True:
            self._skip(self._BLANK)
            if self._text[self._at] == "]":
                self._at += 1
                return
            yield (*path, index), self._line()
            yield from self._value((*path, index))
            index += 1
            self._skip(self._BLANK)
            if self._text[self._at] == ",":
                self._at += 1

    def _inline(self, path: Path) -> Iterator[tuple[Path, int]]:
        self._at += 1
        while True:
            self._skip(self._BLANK)
            if self._text[self._at] == "}":
                self._at += 1
                return
            line = self._line()
            key = path + self._key()
            yield key, line
            self._skip(self._BLANK)
            self._at += 1  # the equals sign, or the colon of JSON
            yield from self._value(key)
            self._skip(self._BLANK)
            if self._text[self._at] == ",":
                self._at += 1
