"""Rename the workspace itself."""

import os

from cloister.prove.inside.support import Box

ID = "fs-rename-workspace"
TITLE = "Rename the workspace itself"
PROMISE = "P-023"
CLASSES = (5,)
EXPECT = "the workspace is a mount point: EBUSY"


def attack(box: Box) -> None:
    """Move it; what lies above it in the sandbox belongs to the sandbox alone."""
    box.refused("rename the workspace", "EBUSY EROFS EXDEV EACCES EPERM", rename, box.workspace)
    box.refused("remove the workspace", "EBUSY EROFS ENOTEMPTY EACCES", os.rmdir, box.workspace)


def rename(path: str) -> None:
    """Rename and, when that works, back."""
    os.rename(path, f"{path}-moved")
    os.rename(f"{path}-moved", path)
