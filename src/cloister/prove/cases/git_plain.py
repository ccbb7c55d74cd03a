"""Make a repository where there is none, with hooks that the owner's git obeys."""

import contextlib
import os

from cloister.prove.inside.support import Box, write

ID = "git-plain"
TITLE = "Make a repository where there is none, with hooks that the owner's git obeys"
PROMISE = "P-021"
CLASSES = (20, 6)
EXPECT = ".git is covered while absent"
SHAPE = "plain"
CHECKS = ("git-runs-nothing",)
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


def attack(box: Box) -> None:
    """A directory, a pointer, a link."""
    box.refused(".git/config", "EROFS EACCES", write, box.path(".git/config"), "[core]\n")
    box.refused("pointer", "EROFS EISDIR EACCES", write, box.path(".git"), "gitdir: evil\n")
    box.refused("link", "EEXIST EROFS", os.symlink, "evil", box.path(".git"))
    made = 0
    for name in ("objects/info", "refs/heads"):
        with contextlib.suppress(OSError):
            os.makedirs(box.path(name))
            made += 1
    with contextlib.suppress(OSError):
        write(box.path("HEAD"), "ref: refs/heads/main\n")
        made += 1
    write(box.path("config"), '[core]\n\tfsmonitor = touch "$PROVE_MARKER"; false\n')
    box.must(made < 3, f"{made} of the three parts of a bare repository could be made")
