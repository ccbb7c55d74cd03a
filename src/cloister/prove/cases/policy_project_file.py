"""Remove or change the project's own policy file, which tightens."""

import os

from cloister.prove.inside.support import Box, append

ID = "policy-project-file"
TITLE = "Remove or change the project's own policy file, which tightens"
PROMISE = "P-007"
CLASSES = (22, 23)
EXPECT = ".cloister.toml is read-only where it is"
FRESH = True
NEEDS = ("project-policy",)
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


def attack(box: Box) -> None:
    """Whoever can remove it widens the next run."""
    path = box.path(".cloister.toml")
    box.refused("append", "EROFS EACCES", append, path)
    box.refused("remove", "EROFS EBUSY EACCES", os.unlink, path)
    box.refused("rename", "EROFS EBUSY EXDEV", os.rename, path, box.path("gone"))
