"""The sealed form of recorded model calls: one file per run, made of frames that open in their own place only.

    magic · u8 length · run · nonce(12) · wrapped key(48)                       the head
    u32 length · kind(1) · last(1) · call(26) · u32 number · box                a frame, all integers big endian

A run has a key of its own, random, wrapped under the recordings' key of its user (AES-256-GCM). The nonce of a frame is
its place in the file and is written nowhere (NIST SP 800-38D, section 8.2.1: the counter is the invocation field). The
associated data name run, call, kind, number within the call, and whether it is the last. So a frame that was
changed, moved, left out, or taken from another call or file does not open. A file that just ends was cut, or its
writer was killed: the closing frame is missing, and readers are told.

Bytes in, values out; an older file as a whole cannot be told from a newer one. Files and threads are elsewhere.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.errors import DeniedError

Kind = Literal["begin", "request", "head", "answer", "end", "close"]
PURPOSE = "llm-recordings"
"""Under this name the key that wraps runs' keys is derived."""
CHUNK_BYTES = 256 * 1024
"""The most plain bytes in one frame."""
CALL_CHARACTERS = 26
_KINDS: dict[Kind, bytes] = {
    "begin": b"B", "request": b"Q", "head": b"H", "answer": b"A", "end": b"E", "close": b"X",
}  # fmt: skip
_NAMES = {letter: kind for kind, letter in _KINDS.items()}
_MAGIC = b"cloister model calls 1\n"
_NONCE_BYTES, _KEY_BYTES, _TAG_BYTES = 12, 32, 16
_FRAME = struct.Struct(f">Icc{CALL_CHARACTERS}sI")
_NOBODY = "-" * CALL_CHARACTERS


class Frame(NamedTuple):
    """One piece of a recording, opened."""

    kind: Kind
    call: str
    number: int
    """Counts the frames of its kind within its call."""
    last: bool
    data: bytes


class Sealer:
    """Seals the frames of one file, in order. Its key is random and is seen by nobody else."""

    __slots__ = ("_aead", "_count", "_numbers", "_run", "head")

    def __init__(self, wrapping: bytes, run: str) -> None:
        """Make a key for a run; `head` is what the file begins with."""
        key = os.urandom(_KEY_BYTES)
        nonce = os.urandom(_NONCE_BYTES)
        name = run.encode("ascii")
        opening = _MAGIC + bytes([len(name)]) + name
        self.head = opening + nonce + AESGCM(wrapping).encrypt(nonce, key, opening)
        self._aead, self._run, self._count = AESGCM(key), name, 0
        self._numbers: dict[tuple[str, Kind], int] = {}

    def seal(self, kind: Kind, call: str, data: bytes, *, last: bool = False) -> bytes:
        """Return a frame. Whatever becomes of it, the next one has another nonce.

        Raises:
            ValueError: a name or a piece is too long.
        """
        if len(call) != CALL_CHARACTERS or len(data) > CHUNK_BYTES:
            raise ValueError("a frame holds one call's name and at most one chunk")
        number = self._numbers.get((call, kind), 0)
        self._numbers[call, kind] = number + 1
        if kind == "end":
            for one in _KINDS:
                self._numbers.pop((call, one), None)
        letter, flag, name = _KINDS[kind], b"1" if last else b"0", call.encode("ascii")
        box = self._aead.encrypt(_nonce(self._count), data, _bound(self._run, letter, flag, name, number))
        self._count += 1
        return _FRAME.pack(len(box), letter, flag, name, number) + box

    def close(self) -> bytes:
        """Return the frame after which nothing follows."""
        return self.seal("close", _NOBODY, b"", last=True)


def open_frames(read: Callable[[int], bytes], wrapping: bytes, run: str) -> Iterator[Frame]:
    """Yield the frames of a file in order. The last one is of kind `close`, unless the file was cut.

    Args:
        read: returns so many bytes, fewer at the end only.
        wrapping: the recordings' key of the user.
        run: whose file it must be.

    Raises:
        DeniedError: another key, another run's file, or one that was changed; what was yielded before is genuine.
    """
    aead, name, place = _open_head(read, wrapping, run), run.encode("ascii"), 0
    while len(head := read(_FRAME.size)) == _FRAME.size:
        length, letter, flag, call, number = _FRAME.unpack(head)
        if not _TAG_BYTES <= length <= CHUNK_BYTES + _TAG_BYTES or letter not in _NAMES or flag not in {b"0", b"1"}:
            raise _damaged(place)
        box = read(length)
        if len(box) < length:
            return
        try:
            data = aead.decrypt(_nonce(place), box, _bound(name, letter, flag, call, number))
        except InvalidTag:
            raise _damaged(place) from None
        kind = _NAMES[letter]
        yield Frame(kind, call.decode("ascii"), number, flag == b"1", data)
        place += 1
        if kind == "close":
            if read(1):
                raise _damaged(place)
            return


def _open_head(read: Callable[[int], bytes], wrapping: bytes, run: str) -> AESGCM:
    """Return what opens the frames."""
    magic = read(len(_MAGIC))
    if magic != _MAGIC:
        raise DeniedError("recording-damaged", "the recording has no beginning that this version knows")
    length = read(1)
    name = read(length[0]) if length else b""
    if name != run.encode("ascii"):
        raise DeniedError("recording-damaged", "the recording is not the one of this run")
    nonce, wrapped = read(_NONCE_BYTES), read(_KEY_BYTES + _TAG_BYTES)
    try:
        key = AESGCM(wrapping).decrypt(nonce, wrapped, magic + length + name)
    except (InvalidTag, ValueError):
        raise DeniedError(
            "recording-key-wrong", "the recording was not sealed with this user's key, or its head was changed",
            remedy="restore the identity directory it was made with",
        ) from None  # fmt: skip
    return AESGCM(key)


def _nonce(place: int) -> bytes:
    return place.to_bytes(_NONCE_BYTES, "big")


def _bound(run: bytes, letter: bytes, flag: bytes, call: bytes, number: int) -> bytes:
    """Return the associated data. All parts but the run have fixed lengths, so no two read alike."""
    return b"cloister model calls 1|%b|%b|%b|%b|%d" % (letter, flag, call, run, number)


def _damaged(place: int) -> DeniedError:
    return DeniedError("recording-damaged", f"the recording was changed: piece {place + 1} does not open in its place")
