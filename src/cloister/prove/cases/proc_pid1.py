"""Get at the first process of the sandbox, which holds the channel to the broker."""

import os

from cloister.prove.inside.support import Box, read

ID = "proc-pid1"
TITLE = "Get at the first process of the sandbox, which holds the channel to the broker"
PROMISE = "P-032"
CLASSES = (25, 34, 39)
EXPECT = "it is not dumpable, so its memory, environment and descriptors belong to root"
SHAPE = "any"


def attack(box: Box) -> None:
    """Memory, environment, descriptors, links; and as what it runs."""
    for name in ("mem", "environ", "auxv", "maps", "stack", "syscall", "pagemap"):
        box.refused(name, "EACCES EPERM ENOENT", read, f"/proc/1/{name}")
    for name in ("root", "cwd", "exe", "ns/mnt"):
        box.refused(name, "EACCES EPERM ENOENT", os.readlink, f"/proc/1/{name}")
    box.refused("fd", "EACCES EPERM ENOENT", os.listdir, "/proc/1/fd")
    for number in range(8):
        box.refused(f"fd/{number}", "EACCES EPERM ENOENT", os.open, f"/proc/1/fd/{number}", os.O_RDWR)
    box.refused("write to its memory", "EACCES EPERM ENOENT", os.open, "/proc/1/mem", os.O_RDWR)
