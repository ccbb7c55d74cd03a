"""Read the kernel's log."""

import os

from cloister.prove.inside.support import Box, syscall

ID = "kernel-log"
TITLE = "Read the kernel's log"
PROMISE = "P-035"
CLASSES = (
    28,
    34,
)
EXPECT = "seccomp answers EPERM, and /dev/kmsg is not there"
SHAPE = "any"


def attack(box: Box) -> None:
    """Through the call, the device and /proc."""
    for action in (3, 10, 9):
        box.refused(f"syslog({action})", "EPERM", syscall, "syslog", action, bytes(4096), 4096)
    box.refused("/dev/kmsg", "ENOENT EACCES EPERM", os.open, "/dev/kmsg", os.O_RDONLY)
    box.refused("/proc/kmsg", "ENOENT EACCES EPERM", os.open, "/proc/kmsg", os.O_RDONLY)
