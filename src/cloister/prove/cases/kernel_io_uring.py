"""Set up an io_uring, whose operations no filter and no audit sees."""

import ctypes
import select

from cloister.prove.inside.support import Box, syscall

ID = "kernel-io-uring"
TITLE = "Set up an io_uring, whose operations no filter and no audit sees"
PROMISE = "P-035"
CLASSES = (26,)
EXPECT = "seccomp answers EPERM"
SHAPE = "any"


def attack(box: Box) -> None:
    """Ask for rings of several sizes and flags."""
    for entries, flags in ((1, 0), (8, 0), (8, 1 << 6), (8, 1 << 1)):
        params = ctypes.create_string_buffer(bytes(8) + flags.to_bytes(4, "little"), 120)
        box.refused(f"io_uring_setup({entries}, flags {flags:#x})", "EPERM", syscall, "io_uring_setup", entries, params)


def twin(box: Box) -> None:
    """What runtimes fall back to: epoll."""
    with select.epoll() as poll:
        box.works("epoll", poll.fileno() >= 0)
