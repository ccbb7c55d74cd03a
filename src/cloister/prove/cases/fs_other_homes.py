"""Look into other homes and host directories."""

import os

from cloister.prove.inside.support import Box, read

ID = "fs-other-homes"
TITLE = "Look into other homes and host directories"
PROMISE = "P-018"
CLASSES = (7, 12)
EXPECT = "they do not exist in the sandbox"
SHAPE = "any"


def attack(box: Box) -> None:
    """Every home of the host's users, and directories with secrets."""
    own = {"/var/log", "/var/lib", "/var/spool", "/var/backups", "/etc/fstab"} if box.facts.get("guest") else set()
    for home in [*box.fact("host_homes"), "/root"]:
        box.refused(str(home), "ENOENT EACCES", os.listdir, str(home))
    for path in (
        "/var/log",
        "/var/lib",
        "/var/spool",
        "/var/backups",
        "/etc/ssh",
        "/etc/ssl/private",
        "/etc/sudoers.d",
        "/etc/NetworkManager",
    ):
        if path in own:
            box.stopped(f"{path}: the image's own")
            continue
        box.refused(path, "ENOENT EACCES", os.listdir, path)
    for path in ("/etc/shadow", "/etc/gshadow", "/etc/sudoers", "/etc/krb5.keytab", "/etc/fstab"):
        if path in own:
            box.stopped(f"{path}: the image's own")
            continue
        box.refused(path, "ENOENT EACCES", read, path)


def twin(box: Box) -> None:
    """The own home is there, and writable."""
    box.works("the home", os.access(box.home, os.W_OK))
