"""Enter another namespace."""

import os

from cloister.prove.inside.support import Box, in_child, syscall

ID = "kernel-setns"
TITLE = "Enter another namespace"
PROMISE = "P-033"
CLASSES = (
    27,
    35,
)
EXPECT = "seccomp answers EPERM"
SHAPE = "any"
LIFTED_BY = ("hardening.nested",)


def attack(box: Box) -> None:
    """Enter the namespaces of the own process, of PID 1, and through a pidfd."""
    for kind in ("user", "mnt", "net", "pid", "ipc", "uts"):
        for pid in ("self", "1"):
            try:
                handle = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
            except (PermissionError, FileNotFoundError) as error:
                box.stopped(f"/proc/{pid}/ns/{kind}: {error.strerror}")
                continue
            box.refused(f"setns {pid} {kind}", "EPERM", in_child, syscall, "setns", handle, 0)
            os.close(handle)
    handle = syscall("pidfd_open", os.getppid(), 0)
    box.refused("setns by pidfd", "EPERM", in_child, syscall, "setns", handle, 131072)
    os.close(handle)
