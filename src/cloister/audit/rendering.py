"""What all renderings share: where a log comes from, and text that cannot act on whoever reads it.

The keeper writes lines (`chain`), `kept` reads them; `ocsf`, `cef`, `syslog` and `otlp` say them in others' words.
"""

from __future__ import annotations

import re

import msgspec


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a log was written: what a receiver needs to tell the logs of many hosts apart."""

    host: str
    """The name of the host."""
    log: str = ""
    """The id of the log."""
    version: str = "0"
    """The version of Cloister that exports."""


_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Control characters (ISO 6429), line and paragraph separators, and the marks that turn the direction of text
(Unicode Standard Annex 9): nobody should see the effect of one that an agent chose."""


def visible(text: str) -> str:
    r"""Return a text in which what would act, or break a line, stands as its escape: `\x1b`, `\u2028`."""
    if text.isprintable():
        return text
    return _UNSEEN.sub(_escape, text)


def single_line(encoded: bytes) -> bytes:
    r"""Return JSON of one line in which such characters stand as `\uXXXX`, so that a decoder finds the same text."""
    text = encoded.decode()
    return encoded if text.isprintable() else _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # noqa: PLR2004  what two digits hold
