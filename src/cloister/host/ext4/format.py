"""The structures of ext4 on disk as values: superblock, group descriptors, inodes.

It parses bytes and checks what one structure can tell of itself; what others must agree with is checked where
they meet (`image`, `mapping`, `tree`). Numbers are those of fs/ext4/ext4.h; everything is little endian.
"""

from __future__ import annotations

import stat
import struct
from typing import NamedTuple

from cloister.errors import DeniedError

SUPERBLOCK_AT = 1024
SUPERBLOCK_BYTES = 1024
MAGIC = 0xEF53
ROOT_INODE = 2
FIRST_FREE_INODE = 11

FILETYPE = 0x2
RECOVER = 0x4
EXTENTS = 0x40
BITS_64 = 0x80
FLEX_BG = 0x200
CSUM_SEED = 0x2000
LARGEDIR = 0x4000
INLINE_DATA = 0x8000
READABLE = FILETYPE | RECOVER | EXTENTS | BITS_64 | FLEX_BG | CSUM_SEED | LARGEDIR | INLINE_DATA
"""The incompatible features that the reader knows; with any other, nothing is read."""

STATE_CLEAN = 0x1

INODE_ENCRYPTED = 0x800
INODE_EXTENTS = 0x80000
INODE_INLINE = 0x10000000

_INODE = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHH")
INODE_BYTES = 128
MAX_INODE_BYTES = 4096
"""mke2fs makes 256; no one asks for more than a page."""
EXTRA_BYTES = 32
"""What follows the old 128 bytes: `i_extra_isize` and the fields that it covers."""
NANOSECONDS = 1_000_000_000
MAX_GROUPS = 1 << 16
"""Of 128 MiB each, as mke2fs makes them: 8 TiB."""


class BrokenImageError(DeniedError):
    """A guest's image is not the file system that it says it is; nothing of it was followed."""

    def __init__(self, message: str) -> None:
        """Say what is wrong with it."""
        super().__init__(
            "vm-disk-broken", f"the virtual machine's disk cannot be read: {message}",
            remedy="cloister discard RUN; or look at the image with debugfs",
        )  # fmt: skip


class Superblock(NamedTuple):
    """What reading and filling need to know of the whole."""

    inodes: int
    blocks: int
    block_bytes: int
    first_data_block: int
    blocks_per_group: int
    inodes_per_group: int
    inode_bytes: int
    descriptor_bytes: int
    state: int
    compatible: int
    incompatible: int
    read_only_compatible: int
    last_orphan: int

    @property
    def groups(self) -> int:
        """How many block groups there are."""
        return -(-(self.blocks - self.first_data_block) // self.blocks_per_group)

    @property
    def unclean(self) -> bool:
        """Whether the journal or the list of orphans holds what is not in its place yet: a guest that died."""
        return bool(self.incompatible & RECOVER or self.last_orphan or self.state != STATE_CLEAN)


def parse_superblock(data: bytes, image_bytes: int) -> Superblock:
    """Return the superblock of an image of so many bytes.

    Raises:
        BrokenImageError: it is none, contradicts itself or the image, or has features that are not known here.
    """
    if len(data) != SUPERBLOCK_BYTES or struct.unpack_from("<H", data, 56)[0] != MAGIC:
        raise BrokenImageError("it holds no ext4 file system")
    inodes, low = struct.unpack_from("<II", data, 0)
    first, log_block = struct.unpack_from("<II", data, 20)
    per_group, _, inodes_per_group = struct.unpack_from("<III", data, 32)
    compatible, incompatible, read_only = struct.unpack_from("<III", data, 92)
    (orphan,) = struct.unpack_from("<I", data, 232)
    (descriptor,) = struct.unpack_from("<H", data, 254)
    (high,) = struct.unpack_from("<I", data, 336)
    (revision,) = struct.unpack_from("<I", data, 76)
    wide = bool(incompatible & BITS_64)
    unknown = incompatible & ~READABLE
    if unknown or not incompatible & FILETYPE:
        raise BrokenImageError(f"it has features that are not known here ({unknown:#x})")
    if log_block > 6 or revision != 1:  # noqa: PLR2004  # 64 KiB, the largest
        raise BrokenImageError("its block size or revision is impossible")
    found = Superblock(
        inodes=inodes,
        blocks=low | (high << 32 if wide else 0),
        block_bytes=1024 << log_block,
        first_data_block=first,
        blocks_per_group=per_group,
        inodes_per_group=inodes_per_group,
        inode_bytes=struct.unpack_from("<H", data, 88)[0],
        descriptor_bytes=descriptor if wide else 32,
        state=struct.unpack_from("<H", data, 58)[0],
        compatible=compatible,
        incompatible=incompatible,
        read_only_compatible=read_only,
        last_orphan=orphan,
    )
    _check(found, image_bytes)
    return found


def _check(found: Superblock, image_bytes: int) -> None:
    size = found.block_bytes
    fits = (
        found.first_data_block == (1 if size == 1024 else 0)  # noqa: PLR2004
        and found.first_data_block < found.blocks <= image_bytes // size
        and 0 < found.blocks_per_group <= size * 8
        and 0 < found.inodes_per_group <= size * 8
        and INODE_BYTES <= found.inode_bytes <= min(size, MAX_INODE_BYTES)
        and found.inode_bytes & (found.inode_bytes - 1) == 0
        and found.descriptor_bytes in {32, 64}
        and found.groups <= MAX_GROUPS
    )
    if not fits:
        raise BrokenImageError("its superblock contradicts itself or the size of the image")
    if found.inodes < FIRST_FREE_INODE or found.inodes > found.groups * found.inodes_per_group:
        raise BrokenImageError("its superblock counts inodes that cannot be")


class Inode(NamedTuple):
    """One inode."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int
    links: int
    flags: int
    generation: int
    mtime_ns: int
    ctime_ns: int
    block: bytes
    """`i_block`: the root of the map of blocks, or a short symbolic link's target."""
    tail: bytes
    """What follows `i_extra_isize`'s fields: room for attributes."""

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)


def parse_inode(number: int, data: bytes) -> Inode:
    """Return an inode; the caller checks that it may be in use.

    Raises:
        BrokenImageError: its extra part is longer than itself.
    """
    (mode, uid, size, _, ctime, mtime, _, gid, links, _, flags, _, block, generation, _, high, _, _, _, uid_high,
     gid_high, _, _) = _INODE.unpack_from(data)  # fmt: skip
    extra = ctime_extra = mtime_extra = 0
    if len(data) >= INODE_BYTES + EXTRA_BYTES:
        extra, _, ctime_extra, mtime_extra = struct.unpack_from("<HHII", data, INODE_BYTES)
        if extra > len(data) - INODE_BYTES or extra % 4:
            raise BrokenImageError(f"inode {number} is longer than there is room")
        ctime_extra, mtime_extra = (ctime_extra if extra >= 8 else 0, mtime_extra if extra >= 12 else 0)  # noqa: PLR2004
    return Inode(
        number, mode, uid | uid_high << 16, gid | gid_high << 16, size | high << 32, links, flags, generation,
        _nanoseconds(mtime, mtime_extra), _nanoseconds(ctime, ctime_extra), block, data[INODE_BYTES + extra :],
    )  # fmt: skip


def _nanoseconds(seconds: int, extra: int) -> int:
    """Join a 32-bit time with its two more bits and its nanoseconds (ext4 documentation, "Inode Timestamps")."""
    signed = seconds - (1 << 32) if seconds & 0x80000000 else seconds
    return (signed + ((extra & 3) << 32)) * NANOSECONDS + min(extra >> 2, NANOSECONDS - 1)
