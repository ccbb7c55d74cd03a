"""Change system files."""

import os

from cloister.prove.inside.support import Box, append, read, write

ID = "fs-system-read-only"
TITLE = "Change system files"
PROMISE = "P-019"
CLASSES = (13, 6)
EXPECT = "read-only mounts: EROFS"
SHAPE = "any"


FILES = (
    "/etc/passwd",
    "/etc/group",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/usr/bin/env",
    "/run/cloister/box/egress.sock",
)
NEW = (
    "/etc/ld.so.preload",
    "/etc/profile.d/x.sh",
    "/etc/cron.d/x",
    "/evil",
    "/usr/evil",
    "/bin/evil",
    "/lib/evil",
    "/var/evil",
    "/run/evil",
    "/run/cloister/evil",
    "/run/cloister/box/evil",
    "/home/evil",
    "/etc/sudoers.d/evil",
)


def attack(box: Box) -> None:
    """Append, replace, remove and add."""
    for path in FILES:
        if os.path.lexists(path):
            box.refused(f"append to {path}", "EROFS EACCES ENXIO", append, path)
            box.refused(f"remove {path}", "EROFS EBUSY EACCES", os.unlink, path)
    for path in NEW:
        if not path.startswith(f"{os.path.dirname(box.home)}/"):
            box.refused(f"make {path}", "EROFS ENOENT EACCES", write, path)


def twin(box: Box) -> None:
    """They can be read."""
    box.works("/etc/passwd", str(os.getuid()) in read("/etc/passwd", 4096))
