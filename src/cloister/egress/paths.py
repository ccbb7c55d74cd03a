"""Request paths: the one reading of a path that every server shares, or a refusal.

A path rule may only be applied to a path that all servers understand alike. So nothing is
resolved here: dot segments, empty segments, `;` parameters, encoded slashes and double
encoding are refused, and only escapes of unreserved characters are decoded (RFC 3986, section
6.2.2.2). Well-behaved clients send such paths anyway. Paths are not changed on their way.
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"%(.{0,2})", re.DOTALL)
_HEX = re.compile(r"[0-9A-Fa-f]{2}")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# "/" and "\" change the segments, "%" starts a second decoding, ";" starts parameters, controls end strings.
_AMBIGUOUS = frozenset("/\\%;") | {chr(code) for code in (*range(0x20), 0x7F)}


class PathError(ValueError):
    """A path that servers may read in different ways; the message says which part."""


def canonical_path(target: str) -> str:
    """Return the path of a request target without its query, in canonical spelling.

    Raises:
        PathError: when the path is ambiguous.
    """
    path = target.split("?", 1)[0]
    if not path.startswith("/") or not path.isascii() or not path.isprintable() or " " in path or "#" in path:
        raise PathError("a path starts with '/' and is made of visible ASCII characters")
    if "\\" in path:
        raise PathError("a backslash separates segments on some servers")
    if ";" in path:
        raise PathError("parameters after ';' are cut off by some servers")
    path = _ESCAPE.sub(_decode, path)
    segments = path.split("/")[1:]
    if any(segment in {".", ".."} for segment in segments):
        raise PathError("dot segments are resolved by some servers")
    if "" in segments[:-1]:
        raise PathError("empty segments are merged by some servers")
    return path


class PathPattern:
    """A compiled path pattern: `*` is any text inside one segment, a segment `**` is one or more segments.

    `/repos/**` matches everything below `/repos/`, not `/repos` itself. Matching takes time in
    proportion to pattern times path, whatever the agent sends: no regular expression is involved.
    """

    def __init__(self, pattern: str) -> None:
        """Compile.

        Raises:
            PathError: when the pattern does not start with '/', is ambiguous, or has `**` beside other text.
        """
        if "?" in pattern:
            raise PathError("a pattern holds no query: '?' cannot be matched")
        self.text = pattern
        self._segments = canonical_path(pattern).split("/")[1:]
        if any("**" in segment and segment != "**" for segment in self._segments):
            raise PathError("'**' stands for whole segments only")

    def matches(self, path: str) -> bool:
        """Match a canonical path: greedy from the left, going back to the last `**` only."""
        segments, patterns = path.split("/")[1:], self._segments
        at = done = 0
        resume: tuple[int, int] | None = None
        while at < len(segments):
            if done < len(patterns) and patterns[done] == "**":
                done, at = done + 1, at + 1
                resume = (done, at)
            elif done < len(patterns) and _segment_matches(patterns[done], segments[at]):
                done, at = done + 1, at + 1
            elif resume is not None:
                done, at = resume[0], resume[1] + 1
                resume = (done, at)
            else:
                return False
        return done == len(patterns)


def _segment_matches(pattern: str, text: str) -> bool:
    """Match one segment: fixed start and end, and the pieces between the stars in order."""
    start, *middle = pattern.split("*")
    if not middle:
        return pattern == text
    end = middle.pop()
    if len(text) < len(start) + len(end) or not text.startswith(start) or not text.endswith(end):
        return False
    at, stop = len(start), len(text) - len(end)
    for piece in middle:
        found = text.find(piece, at, stop)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def _decode(match: re.Match[str]) -> str:
    """Decode one escape if it is an unreserved character; refuse the ambiguous ones."""
    digits = match[1]
    if not _HEX.fullmatch(digits):
        raise PathError("'%' is not followed by two hexadecimal digits")
    char = chr(int(digits, 16))
    if char in _AMBIGUOUS:
        raise PathError(f"'%{digits}' is decoded by some servers and not by others")
    return char if char in _UNRESERVED else f"%{digits.upper()}"
