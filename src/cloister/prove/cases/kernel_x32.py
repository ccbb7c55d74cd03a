"""Call the kernel through the x32 ABI, whose numbers a careless filter lets pass."""

import os

from cloister.prove.inside.support import Box, in_child, raw_syscall

ID = "kernel-x32"
TITLE = "Call the kernel through the x32 ABI, whose numbers a careless filter lets pass"
PROMISE = "P-037"
CLASSES = (29,)
EXPECT = "seccomp answers ENOSYS or EPERM"
SHAPE = "any"
ARCH = ("x86_64",)


def attack(box: Box) -> None:
    """getpid, ptrace, unshare and io_uring with the x32 bit."""
    for name, number in (("getpid", 39), ("ptrace", 521), ("unshare", 272), ("io_uring_setup", 425)):
        box.refused(f"x32 {name}", "ENOSYS EPERM", in_child, raw_syscall, number | 1073741824, 0, 0, 0, 0)


def twin(box: Box) -> None:
    """The same call the proper way."""
    box.works("getpid", raw_syscall(39) == os.getpid())
