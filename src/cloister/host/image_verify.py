"""Look at every byte of an image, as no boot does: data, hash tree and superblock of its root."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cloister.host.image_open import OpenedImage, changed
from cloister.images.verity import BLOCK, check, superblock

_PIECE = 256
"""Blocks that are read at once."""


def verify_root(opened: OpenedImage) -> None:
    """Check data, tree and superblock of an opened image's root; kernel and initramfs were checked by opening it.

    Raises:
        DeniedError: `image-changed`, with the first block that is not as it was signed.
        OSError: it cannot be read.
    """
    table, root = opened.manifest.root, opened.root
    salt, digest = bytes.fromhex(table.salt), bytes.fromhex(table.root_hash)
    place = f"{opened.path}/root.img"
    if table.hash_start != table.data_blocks + 1:
        raise changed(place, "its tree does not begin behind its superblock")
    tree = os.pread(root, table.size - table.hash_start * BLOCK, table.hash_start * BLOCK)
    damage = check(_blocks(root, table.data_blocks), table.data_blocks, tree, salt, digest)
    if damage is not None:
        what = "hash tree" if damage.kind == "tree" else "file system"
        raise changed(place, f"block {damage.block} of the {what} is another")
    if os.pread(root, BLOCK, table.data_blocks * BLOCK) != superblock(table.data_blocks, salt, digest):
        raise changed(place, "the superblock of its tree is another")


def _blocks(descriptor: int, count: int) -> Iterator[bytes]:
    for first in range(0, count, _PIECE):
        piece = os.pread(descriptor, min(_PIECE, count - first) * BLOCK, first * BLOCK)
        for at in range(0, len(piece), BLOCK):
            yield piece[at : at + BLOCK]
