"""Make a hard link across a border, and write through it."""

import os

from cloister.prove.inside.support import Box, scratch

ID = "fs-hardlink"
TITLE = "Make a hard link across a border, and write through it"
PROMISE = "P-026"
CLASSES = (4,)
EXPECT = "each protected path is a mount of its own: EXDEV; what is outside does not exist"


def attack(box: Box) -> None:
    """Link to a secret, to the system, to protected files of the workspace, and into protected directories."""
    covered = [] if box.fact("overlay") else [box.path(".git/config"), box.path(".mcp.json")]
    for source in (str(box.fact("secret")), "/etc/passwd", "/usr/bin/env", *covered):
        with scratch(box.path("hard")) as name:
            box.refused(f"link {source}", "EXDEV ENOENT EPERM EACCES", os.link, source, name)
    with scratch(box.path("evil.txt")) as name:
        with open(name, "w") as file:
            file.write("#!/bin/sh\n")
        for target in (".git/hooks/pre-commit", ".vscode/tasks.json") if covered else ():
            box.refused(f"link into {target}", "EXDEV EROFS", os.link, name, box.path(target))


def twin(box: Box) -> None:
    """Hard links within the workspace work: git and package managers make them."""
    with scratch(box.path("one")) as one, scratch(box.path("two")) as two:
        with open(one, "w") as file:
            file.write("x")
        os.link(one, two)
        box.works("a hard link", os.stat(one).st_nlink == 2)
