"""Reach a hidden file with openat2 and from other directories."""

import errno
import os
import struct

from cloister.prove.inside.support import Box, syscall

ID = "fs-openat2"
TITLE = "Reach a hidden file with openat2 and from other directories"
PROMISE = "P-018"
CLASSES = (9, 10)
EXPECT = "the path does not exist, whatever call asks for it"


def attack(box: Box) -> None:
    """openat2 with each RESOLVE flag, and dots from several directories."""
    secret = str(box.fact("secret"))
    for flags in (0, 0x01, 0x02, 0x04, 0x20):
        how = struct.pack("<QQQ", os.O_RDONLY, 0, flags)
        box.refused(
            f"openat2 {flags:#x}",
            "ENOENT EACCES EXDEV EAGAIN ENOSYS",
            syscall,
            "openat2",
            -100,
            secret.encode(),
            how,
            len(how),
        )
    dots = "/".join([".."] * 30)
    for start in (box.workspace, box.home, "/tmp", "/proc/self", "/dev/shm", "/run/cloister"):
        box.refused(f"dots from {start}", "ENOENT EACCES", os.open, f"{start}/{dots}{secret}", os.O_RDONLY)


def twin(box: Box) -> None:
    """openat2 works on files that are there, or is not there itself (a unit: modes in it cannot be filtered)."""
    how = struct.pack("<QQQ", os.O_RDONLY, 0, 0)
    try:
        os.close(syscall("openat2", -100, box.path("README").encode(), how, len(how)))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
