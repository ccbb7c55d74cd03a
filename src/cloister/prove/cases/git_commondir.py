"""Move git to a configuration of the agent's own with commondir."""

import os
import shutil

from cloister.prove.inside.support import Box, write

ID = "git-commondir"
TITLE = "Move git to a configuration of the agent's own with commondir"
PROMISE = "P-021"
CLASSES = (20, 6)
EXPECT = "commondir is covered while absent"
CHECKS = ("git-runs-nothing",)
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


def attack(box: Box) -> None:
    """Build a complete git directory elsewhere in the workspace and point to it."""
    evil = box.path("evil-common")
    os.makedirs(f"{evil}/objects", exist_ok=True)
    os.makedirs(f"{evil}/refs", exist_ok=True)
    write(f"{evil}/HEAD", "ref: refs/heads/main\n")
    write(f"{evil}/config", '[core]\n\trepositoryformatversion = 0\n\tfsmonitor = touch "$PROVE_MARKER"; false\n')
    try:
        if not box.refused("commondir", "EROFS EACCES", write, box.path(".git/commondir"), "../evil-common\n"):
            os.unlink(box.path(".git/commondir"))
        box.refused("link at commondir", "EEXIST EROFS", os.symlink, "../evil-common", box.path(".git/commondir"))
    finally:
        shutil.rmtree(evil)
