"""What the agent holds in place of secrets: made for one run, recognised in any of its spellings.

All placeholders of one run share a mark of 80 random bits, so that looking for them takes the
same few searches however many there are. A placeholder says what it is (`cloister-NAME-…`) and
is worth nothing: only the broker of its run knows what it stands for. Where a placeholder may
go, and what takes its place, is for `bindings` and `inject`.
"""

from __future__ import annotations

import base64
import re
import secrets
from binascii import unhexlify
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

_LETTERS = "abcdefghijklmnopqrstuvwxyz234567"  # base32: in base64 it never needs + or /, so both alphabets agree
_MARK = 16
_OWN = 16
_KEY_ID = "AKIA"
_KEY_ID_CHARS = 16  # an access key id has 20 characters, "AKIA" first (IAM user guide, "Unique identifiers")
_SECRET_KEY_CHARS = 40
_HEAD = "cloister"
_ESCAPED = 3
NONE: Mapping[str, tuple[str, str]] = MappingProxyType({})
_ESCAPES = re.compile(rb"%[0-9A-Fa-f]{2}(?:%[0-9A-Fa-f]{2})*")  # the first one apart: a literal to look for is fast


class Placeholder(NamedTuple):
    """What stands for one secret. `key_id` goes with `sigv4` only, where the agent needs a pair."""

    token: str
    key_id: str = ""
    former: tuple[str, ...] = ()
    """What stood for it in the runs from whose memory this one goes on: tokens and key ids, as good as its own."""

    def stands_in(self, data: bytes) -> bool:
        """Say whether bytes hold it: plain, percent-encoded, or in the base64 of an Authorization field."""
        wanted = [text.encode() for text in (self.token, self.key_id, *self.former) if text]
        readings = [data]
        if b"%" in data:
            readings.append(unquote_to_bytes(data))
        scheme, _, rest = data.partition(b" ")
        if scheme.lower() == b"basic":
            readings.append(decode_base64(rest))
        return any(one in reading for one in wanted for reading in readings)


class Placeholders:
    """All placeholders of one run."""

    def __init__(
        self, kinds: Mapping[str, str], choose: Callable[[str], str] = secrets.choice,
        former: Mapping[str, tuple[str, ...]] = NONE,
    ) -> None:  # fmt: skip
        """Make one for each credential.

        Args:
            kinds: the injection scheme by the credential's name.
            choose: picks one of the letters it is given; the operating system's randomness unless a test says other.
            former: tokens and key ids by credential, of runs whose processes go on in this one. One whose credential
                is none of this run's is known all the same: it shall be refused, and must not leave.
        """
        self._mark = _random(_MARK, choose)
        self._key_mark = _random(_KEY_ID_CHARS - 4, choose).upper()
        known = {**dict.fromkeys(former, "header"), **kinds}
        self._made = {name: self._make(name, scheme, choose) for name, scheme in known.items()}
        pairs = any(one.key_id for one in self._made.values())
        marks = [self._mark, *([self._key_mark] if pairs else [])] if self._made else []
        for name, texts in former.items():
            self._made[name] = self._made[name]._replace(former=tuple(filter(None, texts)))
            marks += [mark for mark in map(_mark_of, texts) if mark and mark not in marks]
        self._needles = tuple(needle for mark in marks for needle in _spelled(mark))
        self._own = {name: _own_needles(one) for name, one in self._made.items()}
        # Every character may be percent-encoded: three bytes for one.
        self.overlap = _ESCAPED * max(map(len, marks), default=0)

    def __getitem__(self, name: str) -> Placeholder:
        """Return the placeholder of a credential; `KeyError` for one the run did not have at its start."""
        return self._made[name]

    def __contains__(self, name: str) -> bool:
        """Say whether the run has a placeholder of this name."""
        return name in self._made

    def names(self) -> Iterable[str]:
        """Return the names of all credentials that have one."""
        return self._made.keys()

    def leaks(self, data: bytes) -> bool:
        """Say whether bytes hold a placeholder of this run, plain, in base64 at any offset, or percent-encoded."""
        return bool(self._needles) and _holds(_readings(data), self._needles)

    def names_in(self, data: bytes, names: Iterable[str]) -> frozenset[str]:
        """Return which of some credentials have their placeholder in bytes, in the same spellings.

        What tells one credential from another is looked for, not the mark; it is as long, so `overlap` serves both.
        """
        readings = _readings(data)
        return frozenset(name for name in names if _holds(readings, self._own[name]))

    def _make(self, name: str, scheme: str, choose: Callable[[str], str]) -> Placeholder:
        own = _random(_OWN, choose)
        if scheme == "sigv4":
            secret = f"{_HEAD}{self._mark}{own}"
            last = _random(4, choose).upper()
            return Placeholder(secret.ljust(_SECRET_KEY_CHARS, "0"), f"{_KEY_ID}{self._key_mark}{last}")
        return Placeholder(f"{_HEAD}-{name}-{self._mark}{own}")


def decode_base64(text: bytes) -> bytes:
    """Return what base64 stands for, in either alphabet and without padding too; nothing where it is none."""
    plain = text.strip().translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except ValueError:
        return b""


def _holds(readings: Iterable[bytes], needles: Iterable[bytes]) -> bool:
    return any(needle in reading for reading in readings for needle in needles)


def _readings(data: bytes) -> tuple[bytes, ...]:
    """Return bytes as they are, and without percent-encoding where there is any."""
    if b"%" not in data:
        return (data,)
    plain, escapes = _ESCAPES.subn(_unescape, data)
    return (data, plain) if escapes else (data,)


def _own_needles(one: Placeholder) -> tuple[bytes, ...]:
    """Return what only this placeholder holds: the random end of its token, and its key id without what all have."""
    texts = (_own_of(text) for text in (one.token, one.key_id, *one.former))
    return tuple(needle for text in texts if text for needle in _spelled(text))


def _own_of(text: str) -> str:
    return text.removeprefix(_KEY_ID) if text.startswith(_KEY_ID) else text[-_OWN:]


def _mark_of(text: str) -> str:
    """Return what all tokens, or all key ids, of a former run have in common."""
    if text.startswith(_KEY_ID):
        return text[len(_KEY_ID) : _KEY_ID_CHARS]
    return text[-_OWN - _MARK : -_OWN]


def _spelled(text: str) -> tuple[bytes, ...]:
    """Return the spellings of text to look for: plain, and in base64 at each offset."""
    return (text.encode(), *_in_base64(text.encode()))


def _random(count: int, choose: Callable[[str], str]) -> str:
    return "".join(choose(_LETTERS) for _ in range(count))


def _unescape(found: re.Match[bytes]) -> bytes:
    """Decode a run of escapes at once: bodies may consist of nothing else."""
    return unhexlify(found[0].replace(b"%", b""))


def _in_base64(mark: bytes) -> list[bytes]:
    """Return the base64 of a mark at each of the three offsets, without the characters its neighbours decide."""
    found = []
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + mark).rstrip(b"=")
        first = -(-before * 8 // 6)  # a character that holds bits of what comes before is not the mark's own
        last = (before + len(mark)) * 8 // 6
        found.append(encoded[first:last])
    return found
