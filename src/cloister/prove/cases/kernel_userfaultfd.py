"""Create a userfaultfd, the usual tool to win kernel races."""

import os

from cloister.prove.inside.support import Box, syscall

ID = "kernel-userfaultfd"
TITLE = "Create a userfaultfd, the usual tool to win kernel races"
PROMISE = "P-035"
CLASSES = (28,)
EXPECT = "seccomp answers EPERM, and /dev/userfaultfd is not there"
SHAPE = "any"


def attack(box: Box) -> None:
    """With and without UFFD_USER_MODE_ONLY."""
    for flags in (0, 1, 0o2000000):
        box.refused(f"userfaultfd({flags:#x})", "EPERM", syscall, "userfaultfd", flags)
    box.refused("/dev/userfaultfd", "ENOENT EACCES", os.open, "/dev/userfaultfd", os.O_RDWR)
