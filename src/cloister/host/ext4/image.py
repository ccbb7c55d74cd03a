"""One ext4 image, open for reading: its blocks, its group descriptors, its inodes.

Everything is bounded by the image's own size: blocks of metadata that are read, blocks that files claim to have. A
sound image stays below these bounds by nature; one whose structures overlap or go in circles meets them and is
refused.
"""

from __future__ import annotations

import os
import struct
from types import TracebackType
from typing import Self

from cloister.host.ext4.format import (
    FIRST_FREE_INODE,
    ROOT_INODE,
    SUPERBLOCK_AT,
    SUPERBLOCK_BYTES,
    BrokenImageError,
    Inode,
    parse_inode,
    parse_superblock,
)

_CACHED_BLOCKS = 64
_METADATA_BLOCKS = 600_000
"""A block for each of as many directories as are read, and some: what a hostile image can cost."""
_TABLE_BYTES = 1 << 16
"""Inodes are read so many bytes at once: neighbours are asked for next."""
_SLOTS = 4_000_000
"""Entries of directories, unused ones and `.` and `..` among them: a kernel leaves one unused in a block at most."""


class Image:
    """An image that nobody writes any more."""

    def __init__(self, path: str | int) -> None:
        """Open it, or take a copy of a descriptor, and read its superblock.

        Raises:
            BrokenImageError: it is no ext4 file system that is known here.
            OSError: it cannot be opened.
        """
        self._fd = os.dup(path) if isinstance(path, int) else os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._bytes = os.fstat(self._fd).st_size
            self.super = parse_superblock(os.pread(self._fd, SUPERBLOCK_BYTES, SUPERBLOCK_AT), self._bytes)
            self._tables = self._inode_tables()
        except BaseException:
            os.close(self._fd)
            raise
        self._metadata = min(self.super.blocks, _METADATA_BLOCKS)
        self._claims = self.super.blocks
        self._slots = _SLOTS
        self._nodes: dict[int, int] = {}
        self._windows: dict[tuple[int, int], bytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the image."""
        os.close(self._fd)

    def block(self, number: int) -> bytes:
        """Return one block of metadata.

        Raises:
            BrokenImageError: there is no such block, or more was read than a sound image has.
        """
        self.check(number, 1)
        self._metadata -= 1
        if self._metadata < 0:
            raise BrokenImageError("its structures overlap or go in circles")
        size = self.super.block_bytes
        data = os.pread(self._fd, size, number * size)
        if len(data) != size:
            raise BrokenImageError("it is shorter than it says")
        return data

    def node(self, number: int, owner: int) -> bytes:
        """Return one block of the map of inode `owner`, which no other has.

        Raises:
            BrokenImageError: as `block`; or it is in the map of another.
        """
        if self._nodes.setdefault(number, owner) != owner:
            raise BrokenImageError("its structures overlap or go in circles")
        return self.block(number)

    def slots(self, count: int) -> None:
        """Count entries of directories that were looked at.

        Raises:
            BrokenImageError: there are more than any sound image has.
        """
        self._slots -= count
        if self._slots < 0:
            raise BrokenImageError("its directories are empty to no end")

    def check(self, number: int, count: int) -> None:
        """Refuse blocks that cannot hold anything of a file.

        Raises:
            BrokenImageError: they lie outside of the image, or where the superblock is.
        """
        if number <= self.super.first_data_block or count < 1 or number + count > self.super.blocks:
            raise BrokenImageError(f"it names blocks that are not there ({number})")

    def claim(self, blocks: int) -> None:
        """Count blocks that a file says it has.

        Raises:
            BrokenImageError: all files together have more than the image.
        """
        self._claims -= blocks
        if self._claims < 0:
            raise BrokenImageError("its files have more blocks than the image")

    def data(self, number: int, at: int, length: int) -> bytes:
        """Return bytes of a file from block `number` on, which `check` has seen."""
        return os.pread(self._fd, length, number * self.super.block_bytes + at)

    def fileno(self) -> int:
        """Return the open image's descriptor."""
        return self._fd

    def inode(self, number: int) -> Inode:
        """Return an inode that is in use.

        Raises:
            BrokenImageError: the number is impossible, or the inode is free.
        """
        found = self.super
        if not (number == ROOT_INODE or FIRST_FREE_INODE <= number <= found.inodes):
            raise BrokenImageError(f"it names inode {number}, which cannot be")
        group, index = divmod(number - 1, found.inodes_per_group)
        offset = index * found.inode_bytes
        window = self._window(group, offset // _TABLE_BYTES)
        start = offset % _TABLE_BYTES
        data = window[start : start + found.inode_bytes]
        if len(data) != found.inode_bytes:
            raise BrokenImageError("it is shorter than it says")
        inode = parse_inode(number, data)
        if not inode.links or not inode.mode:
            raise BrokenImageError(f"it names inode {number}, which is free")
        return inode

    def _window(self, group: int, index: int) -> bytes:
        key = (group, index)
        window = self._windows.get(key)
        if window is None:
            if len(self._windows) >= _CACHED_BLOCKS:
                del self._windows[next(iter(self._windows))]
            at = self._tables[group] * self.super.block_bytes + index * _TABLE_BYTES
            window = self._windows[key] = os.pread(self._fd, _TABLE_BYTES, at)
        return window

    def _inode_tables(self) -> list[int]:
        """Return the first block of each group's inode table."""
        found = self.super
        size = found.descriptor_bytes
        at = (found.first_data_block + 1) * found.block_bytes
        data = os.pread(self._fd, found.groups * size, at)
        if len(data) != found.groups * size:
            raise BrokenImageError("it is shorter than it says")
        blocks = -(-found.inodes_per_group * found.inode_bytes // found.block_bytes)
        tables = []
        for start in range(0, len(data), size):
            (low,) = struct.unpack_from("<I", data, start + 8)
            high = struct.unpack_from("<I", data, start + 40)[0] if size == 64 else 0  # noqa: PLR2004
            number = low | high << 32
            self.check(number, blocks)
            tables.append(number)
        return tables
