"""Make device nodes."""

import os
import stat

from cloister.prove.inside.support import Box, scratch

ID = "fs-mknod"
TITLE = "Make device nodes"
PROMISE = "P-019"
CLASSES = (11,)
EXPECT = "EPERM without CAP_MKNOD, and mounts are nodev"


def attack(box: Box) -> None:
    """The first disk, physical memory, the kernel's log and loop, in each writable place."""
    for place in (box.workspace, "/tmp", box.home, "/dev/shm"):
        for name, kind, major, minor in (
            ("sda", stat.S_IFBLK, 8, 0),
            ("vda", stat.S_IFBLK, 253, 0),
            ("mem", stat.S_IFCHR, 1, 1),
            ("kmsg", stat.S_IFCHR, 1, 11),
        ):
            with scratch(f"{place}/evil-{name}") as path:
                box.refused(
                    f"{name} in {place}", "EPERM EACCES", os.mknod, path, kind | 0o600, os.makedev(major, minor)
                )


def twin(box: Box) -> None:
    """Named pipes are no devices."""
    with scratch(box.path("pipe")) as path:
        os.mkfifo(path)
        box.works("a named pipe", stat.S_ISFIFO(os.stat(path).st_mode))
