"""Where the bytes of a file lie in an image: extent trees, and the block maps of older files.

Hostile maps are bounded four ways: a node's children must lie one level lower, logical blocks must rise, no block is a
node twice, and both nodes and claimed blocks are counted by the `Image`. Holes, and extents that were never written,
are left out: they read as zero.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from cloister.host.ext4.format import INODE_ENCRYPTED, INODE_EXTENTS, INODE_INLINE, BrokenImageError, Inode
from cloister.host.ext4.image import Image

EXTENT_MAGIC = 0xF30A
MAX_LEVELS = 5
LONGEST = 32768
"""Blocks of a written extent; what is longer by this much is not written yet."""
_DIRECT = 12


class Span(NamedTuple):
    """Blocks of a file that lie side by side."""

    logical: int
    physical: int
    blocks: int


def spans(image: Image, inode: Inode) -> Iterator[Span]:
    """Yield where a file's blocks lie, in the order of the file.

    Raises:
        BrokenImageError: the map is impossible.
    """
    if inode.flags & INODE_ENCRYPTED:
        raise BrokenImageError(f"inode {inode.number} is encrypted")
    if inode.flags & INODE_INLINE:
        return
    end = -(-inode.size // image.super.block_bytes)
    nodes = _Nodes(image, inode.number)
    extents = bool(inode.flags & INODE_EXTENTS)
    found = _extents(nodes, inode.block, None, 0) if extents else _indirect(nodes, inode.block, end)
    at = 0
    for span in found:
        if span.logical < at:
            raise BrokenImageError(f"the blocks of inode {inode.number} are out of order")
        at = span.logical + span.blocks
        image.check(span.physical, span.blocks)
        image.claim(span.blocks)
        if span.logical >= end:
            continue  # reserved behind the end (fallocate(2), FALLOC_FL_KEEP_SIZE)
        yield span._replace(blocks=min(span.blocks, end - span.logical))


class _Nodes:
    """The blocks of one map, each of which is met once."""

    def __init__(self, image: Image, owner: int) -> None:
        self.image, self.owner = image, owner
        self._met: set[int] = set()

    def __call__(self, number: int) -> bytes:
        """Return a block.

        Raises:
            BrokenImageError: it was met, is another's, or cannot be.
        """
        if number in self._met:
            raise BrokenImageError("its structures overlap or go in circles")
        self._met.add(number)
        return self.image.node(number, self.owner)


def _extents(nodes: _Nodes, node: bytes, level: int | None, at: int) -> Iterator[Span]:
    number = nodes.owner
    magic, entries, _, depth = struct.unpack_from("<HHHH", node)
    if magic != EXTENT_MAGIC or entries > (len(node) - 12) // 12 or depth > MAX_LEVELS:
        raise BrokenImageError(f"the extents of inode {number} are damaged")
    if level is not None and depth != level:
        raise BrokenImageError(f"the extents of inode {number} go in circles")
    for index in range(entries):
        if depth:
            first, low, high = struct.unpack_from("<IIH", node, 12 + 12 * index)
            if first < at:
                raise BrokenImageError(f"the extents of inode {number} are out of order")
            at = first
            yield from _extents(nodes, nodes(low | high << 32), depth - 1, first)
            continue
        logical, length, high, low = struct.unpack_from("<IHHI", node, 12 + 12 * index)
        if logical < at or not length:
            raise BrokenImageError(f"the extents of inode {number} are out of order")
        written = length <= LONGEST
        at = logical + (length if written else length - LONGEST)
        if written:
            yield Span(logical, low | high << 32, length)
        else:
            nodes.image.claim(length - LONGEST)  # it costs the walk a step, so it counts


def _indirect(nodes: _Nodes, block: bytes, end: int) -> Iterator[Span]:
    """Yield the blocks of a file with a block map (ext2, or `chattr -e`)."""
    pointers = struct.unpack("<15I", block)
    for logical, physical in enumerate(pointers[:_DIRECT]):
        if physical:
            yield Span(logical, physical, 1)
    per_block = nodes.image.super.block_bytes // 4
    at = _DIRECT
    for level, pointer in enumerate(pointers[_DIRECT:], start=1):
        if pointer and at < end:
            yield from _pointers(nodes, pointer, level, at, end)
        at += per_block**level


def _pointers(nodes: _Nodes, number: int, level: int, at: int, end: int) -> Iterator[Span]:
    data = nodes(number)
    if data == bytes(len(data)):
        return
    per_block = len(data) // 4
    below = per_block ** (level - 1)
    for physical in struct.unpack(f"<{per_block}I", data):
        if at >= end:
            return
        if physical and level > 1:
            yield from _pointers(nodes, physical, level - 1, at, end)
        elif physical:
            yield Span(at, physical, 1)
        at += below
