"""dm-verity's hash tree: building it, and checking data against it. Pure: blocks come in, bytes go out.

Format 1 of the kernel (Documentation/admin-guide/device-mapper/verity.rst): SHA-256 over salt and block, digests packed
into blocks, the topmost level first. The superblock is that of cryptsetup's veritysetup(8), so that its `verify` can
check our images; nothing of ours, and no guest, ever reads it: what counts is the table in the signed manifest.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

BLOCK = 4096
_DIGEST = 32
_PER_BLOCK = BLOCK // _DIGEST


class Tree(NamedTuple):
    """A tree as it stands on the disk, behind its superblock."""

    root: bytes
    blocks: bytes
    """All levels, the topmost first."""


class Damage(NamedTuple):
    """The first block that is not as it was signed."""

    kind: str
    """`data` or `tree`."""
    block: int
    """Its number, counted from the beginning of the data or of the tree."""


def digest(salt: bytes, block: bytes) -> bytes:
    """Return the digest of one block."""
    return hashlib.sha256(salt + block).digest()


def levels(data_blocks: int) -> list[int]:
    """Return the sizes of the tree's levels in blocks, the topmost first.

    Raises:
        ValueError: below two blocks there is no tree.
    """
    if data_blocks < 2:  # noqa: PLR2004
        raise ValueError("a tree stands over two blocks at least")
    sizes = [-(-data_blocks // _PER_BLOCK)]
    while sizes[0] > 1:
        sizes.insert(0, -(-sizes[0] // _PER_BLOCK))
    return sizes


def build(blocks: Iterable[bytes], salt: bytes) -> Tree:
    """Return the tree over blocks of `BLOCK` bytes.

    Raises:
        ValueError: there are fewer than two blocks.
    """
    first = hashlib.sha256(salt)
    digests = bytearray()
    for block in blocks:
        state = first.copy()
        state.update(block)
        digests += state.digest()
    made: list[bytes] = []
    for _ in levels(len(digests) // _DIGEST):
        made.insert(0, bytes(digests) + bytes(-len(digests) % BLOCK))
        digests = bytearray(b"".join(digest(salt, block) for block in _split(made[0])))
    return Tree(bytes(digests), b"".join(made))


def check(blocks: Iterable[bytes], data_blocks: int, tree: bytes, salt: bytes, root: bytes) -> Damage | None:
    """Return the first block that is not as it was signed; every block of tree and data is looked at.

    Args:
        blocks: the data, in blocks of `BLOCK` bytes.
        data_blocks: how many there must be.
        tree: all levels, the topmost first.
        salt: what each digest begins with.
        root: the digest that was signed.
    """
    above, position = root, 0
    for size in levels(data_blocks):
        level = tree[position * BLOCK : (position + size) * BLOCK]
        wrong = _first_wrong(_split(level), size, above, salt)
        if wrong is not None:
            return Damage("tree", position + wrong)
        above, position = level, position + size
    wrong = _first_wrong(blocks, data_blocks, above, salt)
    return None if wrong is None else Damage("data", wrong)


def _first_wrong(blocks: Iterable[bytes], count: int, digests: bytes, salt: bytes) -> int | None:
    first, number = hashlib.sha256(salt), 0
    for block in blocks:
        state = first.copy()
        state.update(block)
        if number >= count or state.digest() != digests[number * _DIGEST : (number + 1) * _DIGEST]:
            return number
        number += 1
    return None if number == count else number


def superblock(data_blocks: int, salt: bytes, root: bytes) -> bytes:
    """Return the block that veritysetup(8) puts before a tree (cryptsetup, lib/verity/verity.c, struct verity_sb).

    Its UUID follows from the root hash, so that the whole block can be checked although nothing signed covers it.
    """
    uuid = hashlib.sha256(b"cloister image verity\0" + root).digest()[:16]
    head = struct.pack("<8sII16s32sIIQH6x256s168x", b"verity\0\0", 1, 1, uuid, b"sha256", BLOCK, BLOCK, data_blocks,
                       len(salt), salt)  # fmt: skip
    return head + bytes(BLOCK - len(head))


def _split(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), BLOCK):
        yield data[at : at + BLOCK]
