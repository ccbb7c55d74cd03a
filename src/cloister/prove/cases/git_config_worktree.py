"""Add configuration files that git reads beside the main one."""

from cloister.prove.inside.support import Box, write

ID = "git-config-worktree"
TITLE = "Add configuration files that git reads beside the main one"
PROMISE = "P-021"
CLASSES = (20, 6)
EXPECT = "config.worktree is covered while absent"
CHECKS = ("git-runs-nothing",)
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


EVIL = '[core]\n\tfsmonitor = touch "$PROVE_MARKER"; false\n'


def attack(box: Box) -> None:
    """config.worktree, of the main and of a linked worktree."""
    box.refused("config.worktree", "EROFS EACCES", write, box.path(".git/config.worktree"), EVIL)
    box.refused("worktrees/x", "EROFS EACCES ENOENT", write, box.path(".git/worktrees/x"), EVIL)
