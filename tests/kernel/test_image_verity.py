"""Our hash tree against another's: veritysetup(8) must believe it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cloister.images.verity import BLOCK
from support.made_image import DATA_BLOCKS, SALT, root_image

pytestmark = pytest.mark.kernel
VERITYSETUP = "/usr/sbin/veritysetup"


def test_veritysetup_makes_the_same_tree(tmp_path: Path) -> None:
    """The independent oracle: the same blocks of the tree, and its `verify` reads our superblock."""
    image, table = root_image()
    ours = tmp_path / "ours"
    ours.write_bytes(image)
    theirs = tmp_path / "theirs"
    theirs.write_bytes(image[: DATA_BLOCKS * BLOCK])
    offset = f"--hash-offset={DATA_BLOCKS * BLOCK}"
    subprocess.run(
        [VERITYSETUP, "format", theirs, theirs, offset, f"--data-blocks={DATA_BLOCKS}", f"--salt={SALT.hex()}"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert theirs.read_bytes()[(DATA_BLOCKS + 1) * BLOCK :] == image[(DATA_BLOCKS + 1) * BLOCK :]
    verify = [VERITYSETUP, "verify", ours, ours, table.root_hash, offset]
    assert subprocess.run(verify, check=False, capture_output=True).returncode == 0
    broken = bytearray(image)
    broken[7 * BLOCK] ^= 1
    ours.write_bytes(broken)
    assert subprocess.run(verify, check=False, capture_output=True).returncode != 0
