"""Watch whole file systems with fanotify."""

import ctypes

from cloister.prove.inside.support import Box, syscall

ID = "kernel-fanotify"
TITLE = "Watch whole file systems with fanotify"
PROMISE = "P-035"
CLASSES = (28,)
EXPECT = "seccomp answers EPERM; inotify works"
SHAPE = "any"


def attack(box: Box) -> None:
    """Unprivileged groups are possible since Linux 5.13."""
    for flags in (0, 0x200, 0x200 | 0x400):
        box.refused(f"fanotify_init({flags:#x})", "EPERM", syscall, "fanotify_init", flags, 0)


def twin(box: Box) -> None:
    """File watchers of development servers use inotify."""
    box.works("inotify", ctypes.CDLL(None).inotify_init1(0o2000000) >= 0)
