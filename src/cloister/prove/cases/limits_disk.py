"""Fill the host's memory through the private /tmp and home."""

import os

from cloister.prove.inside.support import Box, scratch

ID = "limits-disk"
TITLE = "Fill the host's memory through the private /tmp and home"
PROMISE = "P-068"
CLASSES = (85,)
EXPECT = "ENOSPC at the limit"
FRESH = True
LIFTED_BY = ("limits.disk_max is not set",)


def attack(box: Box) -> None:
    """Each of the two places, a little beyond the limit."""
    limit = int(box.fact("disk_bytes"))
    for place in ("/tmp", box.home):
        with scratch(f"{place}/fill") as path:
            box.refused(place, "ENOSPC EDQUOT EFBIG", fill, path, limit + (8 << 20))


def fill(path: str, size: int) -> None:
    """Write `size` bytes."""
    with open(path, "wb", buffering=0) as file:
        for _ in range(size >> 20):
            if file.write(bytes(1 << 20)) < 1 << 20:
                raise OSError(28, os.strerror(28))
