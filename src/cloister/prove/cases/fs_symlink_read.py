"""Read a secret through a symbolic link."""

import os

from cloister.prove.inside.support import Box, read, scratch

ID = "fs-symlink-read"
TITLE = "Read a secret through a symbolic link"
PROMISE = "P-025"
CLASSES = (1, 8)
EXPECT = "the target does not exist in the sandbox"


def attack(box: Box) -> None:
    """Link to secrets of the host and of its owner."""
    targets = [
        str(box.fact("secret")),
        str(box.fact("home_canary")),
        "/etc/shadow",
        os.path.join("/root", ".ssh/id_rsa"),
        "/proc/1/root" + str(box.fact("secret")),
    ]
    for target in targets:
        with scratch(box.path("link-out")) as link:
            os.symlink(target, link)
            box.refused(target, "ENOENT EACCES", read, link)
