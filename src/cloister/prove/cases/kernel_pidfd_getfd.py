"""Take a file descriptor out of another process."""

import os

from cloister.prove.inside.support import Box, syscall

ID = "kernel-pidfd-getfd"
TITLE = "Take a file descriptor out of another process"
PROMISE = "P-034"
CLASSES = (
    25,
    39,
)
EXPECT = "seccomp answers EPERM"
SHAPE = "any"
LIFTED_BY = ("hardening.ptrace",)


def attack(box: Box) -> None:
    """Take the control channel of PID 1, and the driver's output; compare kernel objects."""
    for name, pid in (("PID 1", 1), ("the driver", os.getppid())):
        handle = syscall("pidfd_open", pid, 0)
        for number in (0, 1, 3, 4, 5):
            box.refused(f"descriptor {number} of {name}", "EPERM", syscall, "pidfd_getfd", handle, number, 0)
        os.close(handle)
    box.refused("kcmp", "EPERM", syscall, "kcmp", os.getpid(), os.getppid(), 0, 0, 0)
