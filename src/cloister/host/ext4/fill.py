"""Files, directories and links put into a fresh ext4 image, as mke2fs has just made it: no mount, one pass.

mke2fs can fill an image itself (-d), but it reads names in every directory again for each new one (a directory of
20,000 names takes 15 s), stops at a file that cannot be read or goes away, follows a link that is swapped in, and
would have to be shown a tree without what is hidden. Here whoever calls opens and reads, and says what goes in. The
image must be without checksums of metadata (`e2fs.make`, not growing); what is written is what e2fsck and the kernel
take without a word.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cloister.errors import UnsupportedError
from cloister.host.ext4.encode import BLOCK, Name, directory_blocks, time_words, trailing_ones, trailing_zeros
from cloister.host.ext4.format import (
    INODE_EXTENTS,
    ROOT_INODE,
    STATE_CLEAN,
    SUPERBLOCK_AT,
    SUPERBLOCK_BYTES,
    Superblock,
    parse_superblock,
)
from cloister.host.ext4.image import Image
from cloister.host.ext4.mapping import EXTENT_MAGIC, LONGEST, Span, spans
from cloister.host.sparse import write_at

INODE = 256
FAST_LINK = 59
_INODE = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHHHHIIIII")
_ROOM = 4
"""Entries of a map in the inode itself."""
_PER_NODE = (BLOCK - 12) // 12
_LOST_AND_FOUND = 11
"""Its inode: the first that mke2fs gives to anything."""
_BUFFER = 4 << 20
_TABLE_BYTES = 1 << 16
_TABLES = 64
"""So many parts of tables of inodes are kept until they are written: a directory comes after what is in it."""


class Attributes(NamedTuple):
    """What an inode carries besides its content."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    ctime_ns: int
    links: int = 1


def _full(where: str) -> UnsupportedError:
    return UnsupportedError("vm-disk-full", "the workspace does not fit on the disk that was made for it", where=where)


class Filler:
    """A fresh image that is being filled. `finish` writes what was counted; without it the image is no file system."""

    def __init__(self, path: str, now_ns: int) -> None:
        """Open the image, as mke2fs made it, and see what is free; `now_ns` is when its files are made."""
        self._path = path
        with Image(path) as image:
            root = image.inode(ROOT_INODE)
            self._root_blocks = [span.physical + at for span in spans(image, root) for at in range(span.blocks)]
            lost = list(spans(image, image.inode(_LOST_AND_FOUND)))
        self._fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._super: Superblock = parse_superblock(
            self._read(SUPERBLOCK_AT, SUPERBLOCK_BYTES), os.fstat(self._fd).st_size
        )
        self._descriptors = bytearray(self._read(BLOCK, self._super.groups * 32))
        self._blocks = [bytearray(self._read(self._bitmap(group, 0) * BLOCK, BLOCK)) for group in self._all_groups()]
        self._inodes = [bytearray(self._read(self._bitmap(group, 4) * BLOCK, BLOCK)) for group in self._all_groups()]
        self._number = _LOST_AND_FOUND - 1  # the last that mke2fs keeps for itself
        self._waiting = bytearray()
        self._waiting_at = 0
        self._tables: dict[int, bytearray] = {}
        self._used_blocks = [0] * self._super.groups
        self._used_inodes = [0] * self._super.groups
        self._directories = [0] * self._super.groups
        self._drop_lost_and_found(lost)
        self._runs = self._free_runs()
        self._run = next(self._runs, Span(0, 0, 0))
        self.now_ns = now_ns
        self._now = time_words(now_ns)

    def close(self) -> None:
        """Close the image."""
        os.close(self._fd)

    def number(self, *, directory: bool = False) -> int:
        """Take the next free inode.

        Raises:
            UnsupportedError: there is none.
        """
        self._number += 1
        if self._number > self._super.inodes:
            raise _full(self._path)
        group, index = divmod(self._number - 1, self._super.inodes_per_group)
        self._inodes[group][index >> 3] |= 1 << (index & 7)
        self._used_inodes[group] += 1
        self._directories[group] += directory
        return self._number

    def put_bytes(self, number: int, how: Attributes, data: bytes) -> None:
        """Write a short regular file: its bytes and its inode."""
        blocks = -(-len(data) // BLOCK)
        found = self._take(blocks) if blocks else []
        at = 0
        for span in found:
            self._append(span.physical, data[at : at + span.blocks * BLOCK])
            at += span.blocks * BLOCK
        self._inode(number, how, len(data), found)

    def put_file(self, number: int, how: Attributes, source: int, size: int, parts: Iterable[tuple[int, int]]) -> None:
        """Write a regular file from an open one: `parts` are first blocks and numbers of blocks that are no hole.

        Where the file is cut short meanwhile, the rest reads as zero.

        Raises:
            OSError: it cannot be read.
            UnsupportedError: the disk is full.
        """
        found: list[Span] = []
        for first, blocks in parts:
            for span in self._take(blocks):
                at = (first + span.logical) * BLOCK
                self._copy(source, at, span.physical * BLOCK, min(span.blocks * BLOCK, size - at))
                found.append(span._replace(logical=first + span.logical))
        self._inode(number, how, size, found)

    def put_link(self, number: int, how: Attributes, target: bytes) -> None:
        """Write a symbolic link."""
        if len(target) > FAST_LINK:
            self.put_bytes(number, how, target)
            return
        self._write_inode(number, how, len(target), target.ljust(60, b"\0"), 0, 0)

    def put_socket(self, number: int, how: Attributes) -> None:
        """Write a Unix socket's inode, which has no content."""
        self._write_inode(number, how, 0, bytes(60), 0, 0)

    def put_directory(self, number: int, parent: int, how: Attributes, names: Iterable[Name]) -> int:
        """Write a directory with its names; return how many blocks it takes."""
        blocks = list(directory_blocks(number, parent, names))
        first = self._root_blocks[: len(blocks)] if number == ROOT_INODE else []
        found = [Span(at, physical, 1) for at, physical in enumerate(first)]
        if len(blocks) > len(first):
            taken = self._take(len(blocks) - len(first))
            found += [span._replace(logical=span.logical + len(first)) for span in taken]
        for span in found:
            data = b"".join(blocks[span.logical : span.logical + span.blocks])
            self._append(span.physical, data)
        self._inode(number, how, len(blocks) * BLOCK, found)
        return len(blocks)

    def set_links(self, number: int, links: int) -> None:
        """Say how many names an inode has, when its last one is known."""
        table, at = self._slot(number)
        struct.pack_into("<H", table, at + 26, links)

    def finish(self) -> None:
        """Write bitmaps and counts: from now on it is a whole file system."""
        self._flush()
        while self._tables:
            self._write_table(next(iter(self._tables)))
        size = struct.Struct("<HHH")
        free_blocks = free_inodes = 0
        for group in self._all_groups():
            write_at(self._fd, self._blocks[group], self._bitmap(group, 0) * BLOCK)
            write_at(self._fd, self._inodes[group], self._bitmap(group, 4) * BLOCK)
            blocks, inodes, directories = size.unpack_from(self._descriptors, group * 32 + 12)
            blocks, inodes = blocks - self._used_blocks[group], inodes - self._used_inodes[group]
            size.pack_into(self._descriptors, group * 32 + 12, blocks, inodes, directories + self._directories[group])
            free_blocks, free_inodes = free_blocks + blocks, free_inodes + inodes
        write_at(self._fd, self._descriptors, BLOCK)
        write_at(self._fd, struct.pack("<II", free_blocks, free_inodes), SUPERBLOCK_AT + 12)
        write_at(self._fd, struct.pack("<H", STATE_CLEAN), SUPERBLOCK_AT + 58)

    def _read(self, at: int, length: int) -> bytes:
        return os.pread(self._fd, length, at)

    def _all_groups(self) -> range:
        return range(self._super.groups)

    def _bitmap(self, group: int, which: int) -> int:
        return int(struct.unpack_from("<I", self._descriptors, group * 32 + which)[0])

    def _free_runs(self) -> Iterator[Span]:
        """Yield the free blocks in runs, group by group."""
        for group, bitmap in enumerate(self._blocks):
            first = group * self._super.blocks_per_group
            count = min(self._super.blocks_per_group, self._super.blocks - first)
            bits = int.from_bytes(bitmap, "little")
            at = 0
            while at < count:
                used = trailing_ones(bits >> at)
                at += used
                free = min(trailing_zeros(bits >> at, count - at), count - at)
                if at < count and free:
                    yield Span(0, first + at, free)
                at += free

    def _drop_lost_and_found(self, lost: list[Span]) -> None:
        """Free the directory that mke2fs makes in every root, which is written anew: it shows what is the user's."""
        for span in lost:
            for block in range(span.physical, span.physical + span.blocks):
                group, index = divmod(block, self._super.blocks_per_group)
                self._blocks[group][index >> 3] &= ~(1 << (index & 7))
                self._used_blocks[group] -= 1
        group, index = divmod(_LOST_AND_FOUND - 1, self._super.inodes_per_group)
        self._inodes[group][index >> 3] &= ~(1 << (index & 7))
        self._used_inodes[group] -= 1
        self._directories[group] -= 1
        table, at = self._slot(_LOST_AND_FOUND)
        table[at : at + INODE] = bytes(INODE)

    def _take(self, blocks: int) -> list[Span]:
        """Take free blocks, in as few runs as there are; logical numbers count from 0."""
        if 0 < blocks <= self._run.blocks and blocks <= LONGEST:
            first = self._run.physical
            self._mark(first, blocks)
            self._run = Span(0, first + blocks, self._run.blocks - blocks)
            return [Span(0, first, blocks)]
        found: list[Span] = []
        have = 0
        while have < blocks:
            if not self._run.blocks:
                run = next(self._runs, None)
                if run is None:
                    raise _full(self._path)
                self._run = run
            count = min(self._run.blocks, blocks - have, LONGEST)
            first = self._run.physical
            found.append(Span(have, first, count))
            self._mark(first, count)
            self._run = Span(0, first + count, self._run.blocks - count)
            have += count
        return found

    def _mark(self, first: int, count: int) -> None:
        group, index = divmod(first, self._super.blocks_per_group)
        self._used_blocks[group] += count
        bitmap = self._blocks[group]
        while count and index & 7:
            bitmap[index >> 3] |= 1 << (index & 7)
            index, count = index + 1, count - 1
        bitmap[index >> 3 : (index >> 3) + (count >> 3)] = b"\xff" * (count >> 3)
        index, count = index + (count & ~7), count & 7
        for bit in range(index, index + count):
            bitmap[bit >> 3] |= 1 << (bit & 7)

    def _append(self, block: int, data: bytes) -> None:
        """Write data at a block; what lies side by side is written at once."""
        at = block * BLOCK
        if at != self._waiting_at + len(self._waiting) or len(self._waiting) > _BUFFER:
            self._flush()
            self._waiting_at = at
        self._waiting += data
        self._waiting += bytes(-len(data) % BLOCK)

    def _flush(self) -> None:
        write_at(self._fd, self._waiting, self._waiting_at)
        self._waiting = bytearray()
        self._waiting_at = 0

    def _copy(self, source: int, at: int, target: int, length: int) -> None:
        """Copy bytes of a file into the image, as many as there are."""
        done = 0
        while done < length:
            data = os.pread(source, min(1 << 20, length - done), at + done)
            if not data:
                return
            write_at(self._fd, data, target + done)
            done += len(data)

    def _inode(self, number: int, how: Attributes, size: int, found: list[Span]) -> None:
        root, extra = self._map(found)
        blocks = sum(span.blocks for span in found) + extra
        self._write_inode(number, how, size, root, blocks, INODE_EXTENTS)

    def _map(self, found: list[Span]) -> tuple[bytes, int]:
        """Return the root of an extent tree, and how many blocks the rest of it takes."""
        entries = [
            struct.pack("<IHHI", span.logical, span.blocks, span.physical >> 32, span.physical & 0xFFFFFFFF)
            for span in found
        ]
        depth = extra = 0
        while len(entries) > _ROOM:
            above = []
            for start in range(0, len(entries), _PER_NODE):
                node = entries[start : start + _PER_NODE]
                (block,) = self._take(1)
                header = struct.pack("<HHHHI", EXTENT_MAGIC, len(node), _PER_NODE, depth, 0)
                self._append(block.physical, header + b"".join(node))
                above.append(node[0][:4] + struct.pack("<IHH", block.physical & 0xFFFFFFFF, block.physical >> 32, 0))
                extra += 1
            entries, depth = above, depth + 1
        header = struct.pack("<HHHHI", EXTENT_MAGIC, len(entries), _ROOM, depth, 0)
        return (header + b"".join(entries)).ljust(60, b"\0"), extra

    def _slot(self, number: int) -> tuple[bytearray, int]:
        """Return the part of a table of inodes that holds inode `number`, and where in it."""
        group, index = divmod(number - 1, self._super.inodes_per_group)
        window, offset = divmod(index * INODE, _TABLE_BYTES)
        at = self._bitmap(group, 8) * BLOCK + window * _TABLE_BYTES
        found = self._tables.get(at)
        if found is None:
            if len(self._tables) >= _TABLES:
                self._write_table(next(iter(self._tables)))
            length = min(_TABLE_BYTES, self._super.inodes_per_group * INODE - window * _TABLE_BYTES)
            found = self._tables[at] = bytearray(self._read(at, length))
        return found, offset

    def _write_table(self, at: int) -> None:
        write_at(self._fd, self._tables.pop(at), at)

    def _write_inode(  # noqa: PLR0913  # what an inode holds
        self, number: int, how: Attributes, size: int, block: bytes, blocks: int, flags: int
    ) -> None:
        mtime, mtime_extra = time_words(how.mtime_ns)
        ctime, ctime_extra = (mtime, mtime_extra) if how.ctime_ns == how.mtime_ns else time_words(how.ctime_ns)
        now, now_extra = self._now
        sectors = blocks * (BLOCK // 512)
        data = _INODE.pack(
            how.mode, how.uid & 0xFFFF, size & 0xFFFFFFFF, mtime, ctime, mtime, 0, how.gid & 0xFFFF, how.links,
            sectors & 0xFFFFFFFF, flags, 0, block, 0, 0, size >> 32, 0,
            sectors >> 32, 0, how.uid >> 16, how.gid >> 16, 0, 0, 32, 0, ctime_extra, mtime_extra, mtime_extra,
            now, now_extra,
        )  # fmt: skip
        table, at = self._slot(number)
        table[at : at + len(data)] = data
