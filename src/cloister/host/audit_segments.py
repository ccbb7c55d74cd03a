"""A segment of the audit log, open for reading from any place: plain or packed. Reads, never writes.

Segments grow, are packed and are removed by their keeper while others read; so a reader takes what is there when it
looks, and one that finds a file gone looks again (`audit_files.segments`). Offsets are those of the plain text, so they
stay true when a segment is packed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from cloister.host.audit_files import MAX_LINE, Segment
from cloister.host.audit_pack import Packed

BLOCK = 1 << 20


class Sign(NamedTuple):
    """What tells that a file is still the one that was looked at, and has not grown."""

    inode: int
    size: int
    changed_ns: int


class Opened:
    """One segment, open for reading."""

    def __init__(self, segment: Segment) -> None:
        """Open it, without following a link.

        Raises:
            OSError: it cannot be opened.
            ValueError: it is packed, and damaged.
        """
        self.segment = segment
        self._descriptor = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._packed = Packed(self._descriptor) if segment.compressed else None
        except (OSError, ValueError):
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._descriptor)

    def sign(self) -> Sign:
        """Return what tells whether the file has changed."""
        status = os.fstat(self._descriptor)
        return Sign(status.st_ino, status.st_size, status.st_mtime_ns)

    @property
    def size(self) -> int:
        """Bytes of plain text that there are now."""
        return self._packed.size if self._packed else os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Return at most `length` bytes of plain text from `offset` on."""
        if self._packed:
            return self._packed.read(offset, length)
        return os.pread(self._descriptor, length, offset)

    def blocks(self, offset: int, end: int, size: int = BLOCK) -> Iterator[tuple[int, bytes]]:
        """Yield whole lines, many at a time, with the offset of the first; what has no newline yet is left out."""
        rest = b""
        while offset + len(rest) < end:
            block = self.read(offset + len(rest), min(size, end - offset - len(rest)))
            if not block:
                return
            whole, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                yield offset, whole + newline
                offset += len(whole) + 1
            elif len(rest) > MAX_LINE:
                return

    def blocks_backwards(self, size: int = BLOCK) -> Iterator[bytes]:
        """Yield whole lines, many at a time, the last ones first; within a block they are in order."""
        end, rest = self.size, b""
        newest = True
        while end > 0:
            start = max(0, end - size)
            block = self.read(start, end - start) + rest
            if newest:
                block = block[: block.rfind(b"\n") + 1]
                newest = not block
            cut = block.find(b"\n") + 1 if start else 0
            if block[cut:]:
                yield block[cut:]
            rest, end = block[:cut], start
