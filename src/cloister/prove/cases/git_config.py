"""Change the repository's configuration, through which git runs programs."""

import contextlib
import os

from cloister.prove.inside.support import Box, append, scratch, write

ID = "git-config"
TITLE = "Change the repository's configuration, through which git runs programs"
PROMISE = "P-021"
CLASSES = (20,)
EXPECT = ".git/config is a read-only mount; the lock file that git would rename over it is of no use"
CHECKS = ("git-runs-nothing",)
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


EVIL = '[core]\n\tfsmonitor = touch "$PROVE_MARKER"; false\n\thooksPath = evil\n\tpager = touch "$PROVE_MARKER"\n[diff]\n\texternal = touch "$PROVE_MARKER"\n'


def attack(box: Box) -> None:
    """Append, replace by rename as git does, remove, truncate."""
    config = box.path(".git/config")
    box.refused("append", "EROFS EACCES", append, config, EVIL)
    with scratch(box.path(".git/config.lock")) as lock:
        with contextlib.suppress(OSError):
            write(lock, EVIL)
        box.refused("rename over it", "EBUSY EROFS EXDEV ENOENT", os.rename, lock, config)
    box.refused("remove", "EBUSY EROFS", os.unlink, config)
    box.refused("truncate", "EROFS EACCES", os.truncate, config, 0)
