"""Meet another agent, or the host, in a shared temporary directory."""

import os

from cloister.prove.inside.support import Box, read, scratch, write

ID = "fs-shared-directories"
TITLE = "Meet another agent, or the host, in a shared temporary directory"
PROMISE = "P-030"
CLASSES = (12,)
EXPECT = "/tmp, /dev/shm, /var/tmp and the home are private to the run"
SHAPE = "any"
NEEDS = ("sibling",)


def attack(box: Box) -> None:
    """Look for files that a neighbour run and the host have put there."""
    sibling = box.fact("sibling")
    for folder in ("/tmp", "/dev/shm", "/var/tmp", box.home):
        box.refused(f"{folder}: neighbour", "ENOENT EACCES", read, f"{folder}/{sibling['name']}")
    for path in box.fact("shared_canaries"):
        box.refused(f"{path}: host", "ENOENT EACCES", read, str(path))
    box.refused("the neighbour's workspace", "ENOENT EACCES", os.listdir, str(sibling["workspace"]))


def twin(box: Box) -> None:
    """The own ones work."""
    for folder in ("/tmp", "/dev/shm", "/var/tmp", box.home):
        with scratch(f"{folder}/mine") as path:
            write(path, "mine")
            box.works(folder, read(path) == "mine")
