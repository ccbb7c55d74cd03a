"""No bytes make the parsers of ext4's structures do anything but read or refuse.

Whole images need mke2fs: tests/kernel/test_ext4_images.py.
"""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from cloister.host.ext4.encode import BLOCK, Name, directory_blocks, time_words
from cloister.host.ext4.format import SUPERBLOCK_BYTES, BrokenImageError, parse_inode, parse_superblock


@given(st.binary(min_size=SUPERBLOCK_BYTES, max_size=SUPERBLOCK_BYTES), st.integers(0, 1 << 48))
def test_any_superblock_is_read_or_refused(data: bytes, size: int) -> None:
    """Whatever stands there, with the magic number in its place: what is accepted fits the image."""
    data = data[:56] + b"\x53\xef" + data[58:]
    try:
        found = parse_superblock(data, size)
    except BrokenImageError:
        return
    assert found.blocks * found.block_bytes <= size


@given(st.binary(min_size=256, max_size=256))
def test_any_inode_is_parsed_or_refused(data: bytes) -> None:
    """No inode's bytes raise anything else."""
    try:
        inode = parse_inode(12, data)
    except BrokenImageError:
        return
    assert inode.size < 1 << 64


@given(st.integers(-(1 << 31), (1 << 34) - (1 << 31) - 1), st.integers(0, 10**9 - 1))
def test_times_come_back(seconds: int, rest: int) -> None:
    """Every time from 1901 to 2446 is read as it was written, to the nanosecond."""
    low, extra = time_words(seconds * 10**9 + rest)
    inode = parse_inode(12, struct.pack("<16xI108xHHII", low, 32, 0, 0, extra).ljust(256, b"\0"))
    assert inode.mtime_ns == seconds * 10**9 + rest


@given(st.sets(st.binary(min_size=1, max_size=255), max_size=80))
def test_blocks_of_a_directory_are_whole(names: set[bytes]) -> None:
    """Entries fill their blocks exactly, and every name is in one of them, once."""
    found = []
    wanted = [Name(name, 20 + at, "file") for at, name in enumerate(sorted(names))]
    for block in directory_blocks(12, 2, wanted):
        assert len(block) == BLOCK
        at = 0
        while at < BLOCK:
            number, length, size, _ = struct.unpack_from("<IHBB", block, at)
            assert length >= 8 + size
            found.append((block[at + 8 : at + 8 + size], number))
            at += length
    assert found == [(b".", 12), (b"..", 2), *((one.name, one.inode) for one in wanted)]
