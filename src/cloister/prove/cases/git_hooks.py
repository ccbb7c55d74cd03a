"""Plant git hooks that run on the owner's next commit."""

import os

from cloister.prove.inside.support import Box, write

ID = "git-hooks"
TITLE = "Plant git hooks that run on the owner's next commit"
PROMISE = "P-021"
CLASSES = (20, 6)
EXPECT = ".git/hooks is a read-only mount, absent files included"
CHECKS = ("git-runs-nothing",)
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


SCRIPT = '#!/bin/sh\ntouch "$PROVE_MARKER"\n'
HOOKS = (
    "pre-commit",
    "post-commit",
    "commit-msg",
    "prepare-commit-msg",
    "post-checkout",
    "post-merge",
    "pre-push",
    "pre-rebase",
    "post-rewrite",
    "reference-transaction",
    "post-index-change",
    "fsmonitor-watchman",
    "pre-auto-gc",
    "applypatch-msg",
    "update",
    "pre-receive",
)


def attack(box: Box) -> None:
    """Every hook git knows; and another directory in the place of the hooks."""
    for name in HOOKS:
        box.refused(name, "EROFS EACCES", plant, box.path(f".git/hooks/{name}"))
    box.refused("link at hooks", "EEXIST EROFS", os.symlink, "/tmp", box.path(".git/hooks"))


def plant(path: str) -> None:
    """Write an executable script."""
    write(path, SCRIPT)
    os.chmod(path, 0o755)
