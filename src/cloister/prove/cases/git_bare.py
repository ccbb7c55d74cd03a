"""Turn the workspace into a bare repository with a configuration of the agent's own."""

import contextlib
import os

from cloister.prove.inside.support import Box, write

ID = "git-bare"
TITLE = "Turn the workspace into a bare repository with a configuration of the agent's own"
PROMISE = "P-021"
CLASSES = (20, 6)
EXPECT = "one of the three parts that make a bare repository is covered"
FRESH = True
CHECKS = ("git-runs-nothing",)
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


def attack(box: Box) -> None:
    """Break .git/HEAD and lay HEAD, objects, refs and config beside the files (setup.c, is_git_directory)."""
    made = 0
    with contextlib.suppress(OSError):
        write(box.path(".git/HEAD"), "broken")
    for name in ("objects/info", "refs/heads"):
        with contextlib.suppress(OSError):
            os.makedirs(box.path(name))
            made += 1
    with contextlib.suppress(OSError):
        write(box.path("HEAD"), "ref: refs/heads/main\n")
        made += 1
    write(box.path("config"), '[core]\n\tbare = false\n\tworktree = .\n\tfsmonitor = touch "$PROVE_MARKER"; false\n')
    box.must(made < 3, f"{made} of the three parts could be made")
