"""Closed segments of the audit log as gzip that can be read from the middle.

A packed segment is a series of gzip members (RFC 1952), each of whole lines and at most `MEMBER` bytes of them, so
`zcat` reads it as any other file. Each member's header tells its own compressed size in an extra field (`CL`, as BGZF
does with `BC`), and the trailer of gzip tells the plain one: a reader finds the member of an offset by looking at
headers alone, and unpacks nothing else. A gzip file without that field is read too, from its beginning.
"""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO, NamedTuple

MEMBER = 256 * 1024
_HEAD = struct.Struct("<2sBBIBBH2sHI")
"""Magic, method, flags, time, extra flags, system, length of the extra field; then its one entry: id, length, size."""
_MAGIC = b"\x1f\x8b"
_FEXTRA = 4
_ID = b"CL"
_TRAILER = struct.Struct("<II")
_EXTRA_BYTES = 8
_KEPT_MEMBERS = 16


class Member(NamedTuple):
    """Where one member is, packed and plain."""

    at: int
    size: int
    plain_at: int
    plain_size: int


def pack(lines: BinaryIO, level: int = 6) -> Iterator[bytes]:
    """Yield the members of a packed segment for its plain lines."""
    rest = b""
    while block := lines.read(MEMBER):
        whole, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            yield _member(whole + newline, level)
    if rest:
        yield _member(rest, level)


def _member(plain: bytes, level: int) -> bytes:
    deflate = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = deflate.compress(plain) + deflate.flush()
    size = _HEAD.size + len(body) + _TRAILER.size
    head = _HEAD.pack(_MAGIC, 8, _FEXTRA, 0, 0, 255, _EXTRA_BYTES, _ID, 4, size)
    return head + body + _TRAILER.pack(zlib.crc32(plain), len(plain) & 0xFFFFFFFF)


class Packed:
    """A packed segment, open for reading. Offsets are those of the plain text."""

    def __init__(self, descriptor: int) -> None:
        """Read the headers of all members; `descriptor` stays the caller's.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no gzip.
        """
        self._descriptor = descriptor
        self._members = _members(descriptor)
        self._starts = [member.plain_at for member in self._members]
        self._whole = b"" if self._members else _unpack_all(descriptor)
        self._unpacked = lru_cache(maxsize=_KEPT_MEMBERS)(self._unpack)

    @property
    def size(self) -> int:
        """Bytes of the plain text."""
        last = self._members[-1] if self._members else None
        return last.plain_at + last.plain_size if last else len(self._whole)

    def read(self, offset: int, length: int) -> bytes:
        """Return at most `length` bytes of the plain text from `offset` on.

        Raises:
            ValueError: a member is damaged.
        """
        if not self._members:
            return self._whole[offset : offset + length]
        parts = []
        while length > 0 and offset < self.size:
            place = bisect_right(self._starts, offset) - 1
            within = offset - self._starts[place]
            part = self._unpacked(place)[within : within + length]
            if not part:
                raise ValueError("a member is shorter than its trailer says")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def _unpack(self, place: int) -> bytes:
        member = self._members[place]
        try:
            plain = zlib.decompress(os.pread(self._descriptor, member.size, member.at), 16 + zlib.MAX_WBITS)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        return plain


def _members(descriptor: int) -> list[Member]:
    """Return all members by their headers, or nothing where one has no size of its own."""
    end, at, plain_at = os.fstat(descriptor).st_size, 0, 0
    found = []
    while at < end:
        head = os.pread(descriptor, _HEAD.size, at)
        if len(head) < _HEAD.size:
            return []
        magic, _, flags, _, _, _, extra, name, length, size = _HEAD.unpack(head)
        if magic != _MAGIC or not flags & _FEXTRA or extra != _EXTRA_BYTES or name != _ID or length != 4:  # noqa: PLR2004
            return []
        if size <= _HEAD.size + _TRAILER.size or at + size > end:
            return []
        _, plain = _TRAILER.unpack(os.pread(descriptor, _TRAILER.size, at + size - _TRAILER.size))
        found.append(Member(at, size, plain_at, plain))
        at, plain_at = at + size, plain_at + plain
    return found


def _unpack_all(descriptor: int) -> bytes:
    """Unpack any gzip file, member after member; what follows a cut is left out."""
    parts, data = [], os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    try:
        while data:
            inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)
            parts.append(inflate.decompress(data))
            data = inflate.unused_data
    except zlib.error as error:
        raise ValueError(str(error)) from error
    return b"".join(parts)
