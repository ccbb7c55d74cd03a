"""No bytes make the parsers of ext4's structures do anything but read or refuse.

Whole images need mke2fs: tests/kernel/test_ext4_images.py.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

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
