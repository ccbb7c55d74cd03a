"""The chain of the log: how an event becomes a line, how lines hold on to one another, what a head signs.

    {"seq":N,<fields of the event>,"hash":"H"}     H = SHA-256(hash of the line before ‖ this line up to `,"hash"`)

The hash before the first line is that of the log's id, so no two logs share a line. A *head* is an event `log.head`
whose last detail is an Ed25519 signature over the hash before it and its own text up to the signature: it vouches for
everything before it and for what it says itself. Every segment begins with an event that names the hash before it
(`previous`), so what is left after old segments were removed can still be verified. The rules are about bytes, not
about JSON values: a verifier in any language needs SHA-256, Ed25519, and nothing that normalises.

Here are no files and no keys (`host/audit_log.py`, `host/audit_key.py`); looking for damage is `verify`.
"""

from __future__ import annotations

from binascii import b2a_base64, hexlify
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import NamedTuple

import msgspec

from cloister.audit.event import Event

MAGIC = b"cloister-audit-v1:"
HEAD_MAGIC = b"cloister-audit-head-v1:"
HASH_BYTES = 32
HEAD_LINES = 10_000
"""A keeper signs at least this often, in lines."""
TAIL = len(b',"hash":"') + 2 * HASH_BYTES + len(b'"}')
"""Bytes of a line that are not hashed, without its newline."""
SIGNATURE = b',"signature":"'

_encode = msgspec.json.Encoder().encode


class Position(NamedTuple):
    """A place in a chain: the number of the last line, and its hash."""

    seq: int
    hash: bytes


def genesis(log: str) -> Position:
    """Return the position before the first line of a log; `log` is its id, 32 hexadecimal digits."""
    return Position(0, sha256(MAGIC + log.encode()).digest())


def key_name(public: bytes) -> str:
    """Return the short name of an Ed25519 public key (32 bytes): how heads say who signed."""
    return sha256(public).hexdigest()[:16]


class Chain:
    """Where a log stands, and the way to its next line. Not for several threads at once."""

    __slots__ = ("hash", "log", "seq")

    def __init__(self, log: str, at: Position | None = None) -> None:
        """Go on after `at`, or begin."""
        self.log = log
        self.seq, self.hash = at or genesis(log)

    @property
    def position(self) -> Position:
        """The last line."""
        return Position(self.seq, self.hash)

    def back_to(self, position: Position) -> None:
        """Forget lines that could not be written."""
        self.seq, self.hash = position

    def line(self, event: bytes) -> bytes:
        """Return the next line, newline included, for an event that is one JSON object without spaces around it."""
        seq = self.seq + 1
        text = b'{"seq":%d,%b' % (seq, event[1:-1])
        digest = sha256(self.hash + text).digest()
        self.seq, self.hash = seq, digest
        return b'%b,"hash":"%b"}\n' % (text, hexlify(digest))

    def lines(self, events: Iterable[bytes]) -> bytes:
        """Return the next lines, for one write."""
        return b"".join(map(self.line, events))

    def head(self, event: Event, sign: Callable[[bytes], bytes]) -> bytes:
        """Return the line of a head; `event` has details, and `sign` returns an Ed25519 signature (64 bytes)."""
        text = b'{"seq":%d,%b' % (self.seq + 1, _encode(event)[1:-2])  # without the braces of details and of the event
        signature = b2a_base64(sign(signed(self.hash, text)), newline=False)
        return self.line(b'{%b%b%b"}}' % (text.partition(b",")[2], SIGNATURE, signature))


def signed(previous: bytes, text: bytes) -> bytes:
    """Return what a head signs: the hash before it, and its own line up to the signature."""
    return HEAD_MAGIC + previous + text


def event_of(line: bytes) -> bytes:
    """Return the event of a line, without its newline, as `encode` had returned it."""
    return b"{" + line[:-TAIL].partition(b",")[2] + b"}"


def encode(event: Event) -> bytes:
    """Return an event as it stands in a line, without number and hash."""
    return _encode(event)
