"""Register a worktree or a submodule whose configuration is the agent's."""

import os

from cloister.prove.inside.support import Box

ID = "git-worktrees"
TITLE = "Register a worktree or a submodule whose configuration is the agent's"
PROMISE = "P-021"
CLASSES = (20, 6)
EXPECT = ".git/worktrees and .git/modules are covered while absent"
CHECKS = ("git-runs-nothing",)
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


def attack(box: Box) -> None:
    """Make the directories, and links in their place."""
    for name in ("worktrees", "modules"):
        box.refused(f"{name}/evil", "EROFS EACCES", os.makedirs, box.path(f".git/{name}/evil"))
        box.refused(f"link at {name}", "EEXIST EROFS", os.symlink, "/tmp", box.path(f".git/{name}"))
