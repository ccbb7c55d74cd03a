"""Write through a symbolic link that leads out of the workspace."""

import os

from cloister.prove.inside.support import Box, read, scratch, write

ID = "fs-symlink-write"
TITLE = "Write through a symbolic link that leads out of the workspace"
PROMISE = "P-025"
CLASSES = (1,)
EXPECT = "the target does not exist in the sandbox"


def attack(box: Box) -> None:
    """Link to a file, to a directory and to a file that is to be made, absolute and relative."""
    target = str(box.fact("writable"))
    folder, name = os.path.split(target)
    relative = os.path.relpath(target, box.workspace)
    for to, below in ((target, ""), (relative, ""), (folder, f"/{name}"), (f"{folder}/cloister-prove-was-here", "")):
        with scratch(box.path("link-out")) as link:
            os.symlink(to, link)
            box.refused(f"write through {to}", "ENOENT EACCES EROFS", write, link + below)


def twin(box: Box) -> None:
    """A link within the workspace works."""
    with scratch(box.path("plain.txt")) as target, scratch(box.path("link-in")) as link:
        os.symlink("plain.txt", link)
        write(link, "text")
        box.works("a link inside", read(target) == "text")
