"""The hash tree of dm-verity: its shape, and that every change is found."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.images.verity import BLOCK, Damage, build, check, levels, superblock

SALT = b"salt" * 8


def blocks(count: int) -> list[bytes]:
    """Data of that many different blocks."""
    return [number.to_bytes(4, "big") * (BLOCK // 4) for number in range(count)]


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(2, [1]), (128, [1]), (129, [1, 2]), (128 * 128, [1, 128]), (128 * 128 + 1, [1, 2, 129])],
)
def test_the_tree_has_as_many_levels_as_the_kernel_expects(count: int, sizes: list[int]) -> None:
    """128 digests to a block, the topmost level first (drivers/md/dm-verity-target.c)."""
    assert levels(count) == sizes


def test_below_two_blocks_there_is_no_tree() -> None:
    """A device of one block has no tree in this format, and none is made up."""
    with pytest.raises(ValueError, match="two blocks"):
        build(blocks(1), SALT)


def test_the_digest_of_a_block_is_over_salt_and_block() -> None:
    """The root of two blocks, computed by hand."""
    data = blocks(2)
    leaf = b"".join(hashlib.sha256(SALT + block).digest() for block in data)
    assert build(data, SALT).root == hashlib.sha256(SALT + leaf + bytes(BLOCK - len(leaf))).digest()


@given(st.integers(2, 400), st.data())
def test_every_changed_bit_is_found_where_it_is(count: int, draw: st.DataObject) -> None:
    """One flipped bit of the data is found in its block, one of the tree in its."""
    data = blocks(count)
    tree = build(data, SALT)
    assert check(data, count, tree.blocks, SALT, tree.root) is None
    number, at = draw.draw(st.integers(0, count - 1)), draw.draw(st.integers(0, BLOCK - 1))
    bad = [*data]
    bad[number] = _flip(bad[number], at)
    assert check(bad, count, tree.blocks, SALT, tree.root) == Damage("data", number)
    place = draw.draw(st.integers(0, len(tree.blocks) - 1))
    damage = check(data, count, _flip(tree.blocks, place), SALT, tree.root)
    assert damage == Damage("tree", place // BLOCK)


@pytest.mark.parametrize("count", [2, 130])
def test_missing_and_further_blocks_are_found(count: int) -> None:
    """Data that is shorter or longer than what was signed, and a tree that is cut off."""
    data = blocks(count)
    tree = build(data, SALT)
    assert check(data[:-1], count, tree.blocks, SALT, tree.root) is not None
    assert check([*data, data[0]], count, tree.blocks, SALT, tree.root) is not None
    assert check(data, count, tree.blocks[:-BLOCK], SALT, tree.root) is not None
    assert check(data, count, tree.blocks, b"other" * 6, tree.root) is not None


def test_the_superblock_is_one_block() -> None:
    """It stands between data and tree, so that the tree begins one block later."""
    block = superblock(100, SALT, bytes(32))
    assert len(block) == BLOCK
    assert block.startswith(b"verity\0\0")


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
