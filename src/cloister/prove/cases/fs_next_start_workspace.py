"""Plant a symbolic link where the next start mounts something."""

import contextlib
import os

from cloister.prove.inside.support import Box, read

ID = "fs-next-start-workspace"
TITLE = "Plant a symbolic link where the next start mounts something"
PROMISE = "P-025"
CLASSES = (3,)
EXPECT = "the next start binds nothing through it, or refuses to start"
STAGES = ("plant", "attack")
PROCEDURE = "next-start"


NAMES = (".bashrc", ".netrc", ".gitconfig", ".vscode", ".claude", ".mcp.json", "sub/.git", ".git/worktrees/x")


def plant(box: Box) -> None:
    """Put links to the host's secret at every name that a start looks at."""
    target = str(box.fact("secret"))
    for name in NAMES:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(box.path(name)), exist_ok=True)
            os.symlink(target, box.path(name))
            box.stopped(f"planted: {name}")
    box.stopped("planted")


def attack(box: Box) -> None:
    """Read through each."""
    for name in NAMES:
        box.refused(name, "ENOENT EACCES ENXIO EISDIR", readable, box.path(name))


def readable(path: str) -> str:
    """Return what a planted path shows; a mask or an empty file shows nothing."""
    text = read(path)
    if "canary" not in text:
        raise PermissionError(13, "nothing to see")
    return text
