"""Change, replace or remove protected files that are there."""

import os

from cloister.prove.inside.support import Box, append, write

ID = "fs-protected-present"
TITLE = "Change, replace or remove protected files that are there"
PROMISE = "P-022"
CLASSES = (6, 21)
EXPECT = "read-only mounts: EROFS, EBUSY"
SHAPE = "full"
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


def attack(box: Box) -> None:
    """Every name of the whole list."""
    for name, kind in box.fact("protected_present"):
        path = box.path(name)
        inner = f"{path}/present.json" if kind == "directory" else path
        box.refused(f"append to {name}", "EROFS EACCES", append, inner)
        box.refused(f"truncate {name}", "EROFS EACCES", write, inner, "")
        box.refused(f"remove {name}", "EROFS EBUSY EACCES", os.unlink, inner)
        box.refused(f"rename {name}", "EROFS EBUSY EXDEV", os.rename, path, box.path("gone"))
        box.refused(f"mode of {name}", "EROFS EPERM", os.chmod, inner, 0o777)
        box.refused(f"times of {name}", "EROFS EPERM", os.utime, inner, (0, 0))


def twin(box: Box) -> None:
    """They can be read, and ordinary files beside them written."""
    with open(box.path(".vscode/present.json")) as file:
        box.works("reading", file.read() == "{}\n")
    append(box.path("src/main.py"))
