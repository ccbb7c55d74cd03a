"""Rename a parent of a protected path away, and put another in its place."""

import ctypes
import os

from cloister.prove.inside.support import Box, syscall

ID = "fs-rename-parent"
TITLE = "Rename a parent of a protected path away, and put another in its place"
PROMISE = "P-023"
CLASSES = (5,)
EXPECT = "every directory above a protected path is a mount point: EBUSY"
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


def attack(box: Box) -> None:
    """Rename, remove and exchange the directories that hold protected files."""
    for name in (".git", ".git/hooks", ".git/config", ".vscode", ".claude", ".mcp.json", ".env"):
        path = box.path(name)
        if not os.path.lexists(path):
            box.stopped(f"{name}: not there")
            continue
        if box.refused(
            f"rename {name}", "EBUSY EROFS EXDEV", os.rename, path, box.path("moved-away")
        ) is False and os.path.lexists(box.path("moved-away")):
            os.rename(box.path("moved-away"), path)
        box.refused(
            f"remove {name}", "EBUSY EROFS ENOTEMPTY EISDIR", os.rmdir if os.path.isdir(path) else os.unlink, path
        )
    os.makedirs(box.path("other"), exist_ok=True)
    box.refused("exchange .git", "EBUSY EROFS EXDEV", exchange, box.path(".git"), box.path("other"))
    os.rmdir(box.path("other"))


def exchange(one: str, two: str) -> None:
    """Call renameat2(2) with RENAME_EXCHANGE; undo it when it works."""
    syscall("renameat2", -100, ctypes.c_char_p(one.encode()), -100, ctypes.c_char_p(two.encode()), 2)
    syscall("renameat2", -100, ctypes.c_char_p(one.encode()), -100, ctypes.c_char_p(two.encode()), 2)


def twin(box: Box) -> None:
    """Ordinary directories can be renamed."""
    os.makedirs(box.path("a-directory"))
    os.rename(box.path("a-directory"), box.path("b-directory"))
    os.rmdir(box.path("b-directory"))
    box.works("a rename", not os.path.exists(box.path("b-directory")))
