"""Taking words out of prompts before they leave: JSON stays JSON, and every byte outside a match stays as it was.

Patterns see text as a model would, with escapes resolved; what is replaced are the bytes that spell a match. Only
values are looked at, never keys, and each string by itself. This finds what patterns describe; it is no proof that
nothing else in a prompt is secret.

What stands for a secret inside a sandbox is none: without redaction it passes, since an agent that has printed its
environment has it in every prompt from then on. With `redact_secrets` it goes the way of all that looks like a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from cloister.policy.model import Llm
from cloister.policy.secretscan import token_pattern

REPLACEMENT = b"[redacted]"

_STRING = re.compile(rb'"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL)
_COLON = re.compile(rb"[ \t\n\r]*:")
_UNIT = re.compile(
    rb"[\x00-\x5b\x5d-\x7f]+|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\."
    rb"|[\xc0-\xff][\x80-\xbf]*",
    re.DOTALL,
)
"""Plain characters, or one that is spelled with more bytes: a pair of surrogates is one, as are the bytes of UTF-8."""
_PRIVATE_KEY = r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)"
_PLACEHOLDER = r"cloister(?:-[a-z0-9-]{1,32}-)?[a-z2-7]{32}"
"""As `credentials/placeholders.py` makes them, of any run; the key id of an AWS pair is among the known tokens."""
_SHORTEST = 4


class Wish(msgspec.Struct, frozen=True):
    """What is taken out for one caller. Its `repr` shows no key."""

    patterns: tuple[str, ...]
    """Of the policy. They may backtrack without end, so they never run in an event loop."""
    secrets: bool
    key: str

    def __repr__(self) -> str:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        return f"Wish({self.patterns!r}, {self.secrets!r})"


class Redactor:
    """The patterns of one agent."""

    def __init__(self, patterns: Iterable[str], *, secrets: bool, key: str = "") -> None:
        """Compile them; with `secrets` also the shapes of known tokens, private keys as a whole, and placeholders.

        Args:
            patterns: of the policy.
            secrets: whether what looks like a secret goes too.
            key: what the run's programs present to the proxy; a placeholder as well, by its value.
        """
        self._patterns = [re.compile(pattern) for pattern in patterns]
        if secrets:
            ours = f"{_PLACEHOLDER}|{re.escape(key)}" if key else _PLACEHOLDER
            self._patterns += [re.compile(_PRIVATE_KEY, re.DOTALL), token_pattern(), re.compile(ours)]

    def redact(self, body: bytes) -> tuple[bytes, int]:
        """Return a body without what the patterns match, and how many matches were replaced."""
        parts: list[bytes] = []
        position = count = 0
        for literal in _STRING.finditer(body):
            inner = literal[1]
            if len(inner) < _SHORTEST or _COLON.match(body, literal.end()):
                continue
            spans = self._spans(inner)
            for start, end in spans:
                parts += (body[position : literal.start(1) + start], REPLACEMENT)
                position = literal.start(1) + end
            count += len(spans)
        if not count:
            return body, 0
        parts.append(body[position:])
        return b"".join(parts), count

    def _spans(self, inner: bytes) -> list[tuple[int, int]]:
        """Return the bytes of a string literal's inside that spell matches, in order, without overlaps."""
        text = _text(inner)
        if text is None:
            return []
        found = sorted(
            match.span()
            for pattern in self._patterns
            for match in pattern.finditer(text)
            if match.end() > match.start()
        )
        if not found:
            return []
        places = _places(inner, sorted({place for span in found for place in span}))
        spans: list[tuple[int, int]] = []
        for start, end in found:
            first, last = places[start], places[end]
            if spans and first < spans[-1][1]:
                spans[-1] = (spans[-1][0], max(spans[-1][1], last))
            else:
                spans.append((first, last))
        return spans


def wish_of(llm: Llm, key: str = "") -> Wish | None:
    """Return what an agent's table asks for, or None; `key` is what the caller presents."""
    if not llm.redact and not llm.redact_secrets:
        return None
    return Wish(llm.redact, llm.redact_secrets, key)


def _text(inner: bytes) -> str | None:
    """Return what the inside of a JSON string stands for; None when it is none, which is refused elsewhere."""
    try:
        return msgspec.json.decode(b'"%b"' % inner, type=str) if b"\\" in inner else inner.decode("utf-8")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _places(inner: bytes, wanted: list[int]) -> dict[int, int]:
    """Return where characters of the text begin in their spelling; their numbers come in order."""
    found: dict[int, int] = {}
    queue = iter(wanted)
    want = next(queue, None)
    number = 0
    for unit in _UNIT.finditer(inner):
        plain = inner[unit.start()] not in b"\\" and inner[unit.start()] < 0x80  # noqa: PLR2004 - ASCII
        count = unit.end() - unit.start() if plain else 1
        while want is not None and want < number + count:
            found[want] = unit.start() + (want - number)
            want = next(queue, None)
        number += count
    while want is not None:
        found[want] = len(inner)
        want = next(queue, None)
    return found
