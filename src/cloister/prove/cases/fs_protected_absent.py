"""Create protected files that were not there at the start."""

import os

from cloister.prove.inside.support import Box, append, write

ID = "fs-protected-absent"
TITLE = "Create protected files that were not there at the start"
PROMISE = "P-022"
CLASSES = (6, 21)
EXPECT = "read-only mounts cover also what is absent: EROFS"
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


def attack(box: Box) -> None:
    """Every name of the list that is protected also while absent: as a file, as a directory, by rename, as a link."""
    for name, kind in box.fact("protected"):
        path = box.path(name)
        if kind == "directory":
            box.refused(f"{name}/settings.json", "EROFS EACCES", write, f"{path}/settings.json")
            box.refused(f"{name}/hooks/", "EROFS EACCES", os.makedirs, f"{path}/hooks")
        else:
            box.refused(name, "EROFS EACCES ENXIO EPERM", append, path)
        box.refused(f"link at {name}", "EEXIST EROFS EACCES", os.symlink, "/tmp/evil", path)
        box.refused(
            f"rename onto {name}",
            "EBUSY EROFS EXDEV EISDIR ENOTEMPTY ENOTDIR EACCES",
            replace,
            box.path("evil-file"),
            path,
        )


def replace(source: str, target: str) -> None:
    """Rename a new file over the target."""
    write(source)
    try:
        os.rename(source, target)
    finally:
        if os.path.lexists(source):
            os.unlink(source)


def twin(box: Box) -> None:
    """Other dot files can be made."""
    write(box.path(".my-own-settings"))
    os.unlink(box.path(".my-own-settings"))
    box.works("another dot file", True)
