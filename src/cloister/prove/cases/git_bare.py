"""Turn the workspace into a bare repository with a configuration of the agent's own."""

import contextlib
import os
from cloister.prove.inside.support import Box, write

ID = "git-bare"
TITLE = "Turn the workspace into a bare repository with a configuration of the agent's own"
PROMISE = "P-021"
CLASSES = (20, 6,)
EXPECT = "HEAD at the top of the workspace is covered"
FRESH = True
CHECKS = ("git-runs-nothing",)
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


def attack(box: Box) -> None:
    """Break .git/HEAD and lay HEAD, objects, refs and config beside the files (setup.c, is_git_directory)."""
    with contextlib.suppress(OSError):
        write(box.path(".git/HEAD"), "broken")
    for name in ("objects", "refs"):
        os.makedirs(box.path(name), exist_ok=True)
    write(box.path("config"), '[core]\n\tbare = false\n\tworktree = .\n\tfsmonitor = touch "$PROVE_MARKER"; false\n')
    box.refused("HEAD", "EROFS EACCES ENXIO", write, box.path("HEAD"), "ref: refs/heads/main\n")
