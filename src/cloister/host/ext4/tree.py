"""Files, directories and links of an image: what is there under which path, and its bytes.

Names come as bytes, as a guest wrote them. No link is followed, no name that could lead elsewhere is given on, and a
tree that is no tree (a directory met twice) is refused. What it yields is bounded; see the constants.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from cloister.host.ext4.format import INODE_INLINE, ROOT_INODE, BrokenImageError, Inode
from cloister.host.ext4.image import Image
from cloister.host.ext4.mapping import spans

MAX_ENTRIES = 500_000
MAX_DEPTH = 128
MAX_PATH_BYTES = 64 << 20
"""All paths of one walk together."""
MAX_LINK = 4095
MAX_ATTRIBUTES = 256
"""Of one inode: each takes 16 bytes and more."""
_CHUNK = 1 << 20
_XATTR_MAGIC = 0xEA020000
_SYSTEM = 7
"""The prefix `system.` of an attribute's name; `system.data` is the rest of inline data."""


class Entry(NamedTuple):
    """One name of the tree."""

    path: bytes
    """Relative to the image's root, without a slash at its start."""
    inode: Inode


def walk(image: Image, top: Inode | None = None) -> Iterator[Entry]:
    """Yield everything below the directory `top`, or the root, parents before children.

    Raises:
        BrokenImageError: it is no tree, or has more of something than is read.
    """
    top = top or _directory(image, ROOT_INODE)
    met = {ROOT_INODE, top.number}
    stack: list[tuple[bytes, Inode, int]] = [(b"", top, 0)]
    entries = length = 0
    while stack:
        place, holder, depth = stack.pop()
        for name, number in names(image, holder):
            path = place + b"/" + name if place else name
            inode = image.inode(number)
            entries += 1
            length += len(path)
            if entries > MAX_ENTRIES or length > MAX_PATH_BYTES:
                raise BrokenImageError(f"it has more than {MAX_ENTRIES} entries, or paths that are too long")
            yield Entry(path, inode)
            if not inode.is_directory:
                continue
            if number in met or depth >= MAX_DEPTH:
                raise BrokenImageError("its directories go in circles, or too deep")
            met.add(number)
            stack.append((path, inode, depth + 1))


def names(image: Image, holder: Inode) -> Iterator[tuple[bytes, int]]:
    """Yield the names in a directory with their inodes' numbers, without `.` and `..`.

    An index (htree) lies in blocks that look empty to this, so both kinds of directories are read the same way.

    Raises:
        BrokenImageError: an entry is impossible.
    """
    seen: set[bytes] = set()
    for data in _directory_blocks(image, holder):
        at = slots = 0
        while at < len(data):
            slots += 1
            if len(data) - at < 8:  # noqa: PLR2004  # the fixed part of an entry
                raise BrokenImageError(f"directory {holder.number} has half an entry")
            number, length, size, kind = struct.unpack_from("<IHBB", data, at)
            if length in {0, 0xFFFF} and len(data) == 1 << 16:
                length = len(data)
            if length < 8 + size or length % 4 or at + length > len(data):
                raise BrokenImageError(f"directory {holder.number} has an entry that is too long")
            name = data[at + 8 : at + 8 + size]
            at += length
            if not number or name in {b".", b".."} or (kind == 0xDE and not size):  # noqa: PLR2004  # a checksum
                continue
            if not name or b"/" in name or b"\0" in name or name in seen:
                raise BrokenImageError(f"directory {holder.number} has a name that cannot be")
            seen.add(name)
            if len(seen) > MAX_ENTRIES:
                raise BrokenImageError(f"it has more than {MAX_ENTRIES} entries")
            yield name, number
        image.slots(slots)


def find(image: Image, path: bytes) -> Inode | None:
    """Return what is at a path below the root; None where nothing is, or a link or file is in the way.

    Raises:
        BrokenImageError: the image is not what it says.
    """
    inode = _directory(image, ROOT_INODE)
    for part in (part for part in path.split(b"/") if part not in {b"", b"."}):
        if part == b".." or not inode.is_directory:
            return None
        number = next((number for name, number in names(image, inode) if name == part), 0)
        if not number:
            return None
        inode = image.inode(number)
    return inode


def contents(image: Image, inode: Inode) -> Iterator[tuple[int, bytes]]:
    """Yield a regular file's bytes with their places, without its holes, at most 1 MiB at once.

    Raises:
        BrokenImageError: its map is impossible.
    """
    if inode.flags & INODE_INLINE:
        yield 0, _inline(inode)[: inode.size]
        return
    size = image.super.block_bytes
    for span in spans(image, inode):
        start = span.logical * size
        end = min(start + span.blocks * size, inode.size)
        for at in range(start, end, _CHUNK):
            data = image.data(span.physical, at - start, min(_CHUNK, end - at))
            if not data:
                raise BrokenImageError("it is shorter than it says")
            yield at, data


def link(image: Image, inode: Inode) -> bytes:
    """Return a symbolic link's target.

    Raises:
        BrokenImageError: it is too long, empty, or holds a NUL.
    """
    if not 0 < inode.size <= MAX_LINK:
        raise BrokenImageError(f"the symbolic link of inode {inode.number} has an impossible length")
    if inode.flags & INODE_INLINE:
        target = _inline(inode)[: inode.size]
    elif inode.size < len(inode.block):
        target = inode.block[: inode.size]
    else:
        target = b"".join(data for _, data in contents(image, inode))
    if len(target) != inode.size or b"\0" in target:
        raise BrokenImageError(f"the symbolic link of inode {inode.number} is damaged")
    return target


def _directory(image: Image, number: int) -> Inode:
    inode = image.inode(number)
    if not inode.is_directory:
        raise BrokenImageError("its root is no directory")
    return inode


def _directory_blocks(image: Image, holder: Inode) -> Iterator[bytes]:
    if holder.flags & INODE_INLINE:
        data = _inline(holder)[: holder.size]
        yield data[4:60]  # the number of the parent comes first
        if len(data) > 60:  # noqa: PLR2004
            yield data[60:]
        return
    if holder.size % image.super.block_bytes:
        raise BrokenImageError(f"directory {holder.number} has an impossible size")
    for span in spans(image, holder):
        for index in range(span.blocks):
            yield image.block(span.physical + index)


def _inline(inode: Inode) -> bytes:
    """Return data kept in the inode: `i_block`, then the attribute `system.data`."""
    tail = inode.tail
    if len(tail) < 4 or struct.unpack_from("<I", tail)[0] != _XATTR_MAGIC:  # noqa: PLR2004
        return inode.block
    at, left = 4, MAX_ATTRIBUTES
    while at + 16 <= len(tail) and tail[at : at + 4] != b"\0\0\0\0":
        left -= 1
        if not left:
            raise BrokenImageError(f"inode {inode.number} has more attributes than there is room for")
        length, kind, offset, block, size = struct.unpack_from("<BBHII", tail, at)
        if kind == _SYSTEM and tail[at + 16 : at + 16 + length] == b"data":
            if block or 4 + offset + size > len(tail):
                raise BrokenImageError(f"the inline data of inode {inode.number} is damaged")
            return inode.block + tail[4 + offset : 4 + offset + size]
        at += 16 + (length + 3) // 4 * 4
    return inode.block
