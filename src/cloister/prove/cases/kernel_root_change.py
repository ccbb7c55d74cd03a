"""Change the root with chroot and pivot_root."""

import os

from cloister.prove.inside.support import Box, in_child, syscall

ID = "kernel-root-change"
TITLE = "Change the root with chroot and pivot_root"
PROMISE = "P-033"
CLASSES = (
    27,
    10,
)
EXPECT = "seccomp answers EPERM"
LIFTED_BY = ("hardening.nested",)


def attack(box: Box) -> None:
    """The classical way out of a chroot begins with a second one."""
    box.refused("chroot", "EPERM", in_child, syscall, "chroot", box.workspace.encode())
    box.refused("pivot_root", "EPERM", syscall, "pivot_root", b".", b".")


def twin(box: Box) -> None:
    """Changing the directory is free."""
    in_child(lambda: os.chdir("/usr"))
    box.works("the directory", os.path.isdir("/usr"))
