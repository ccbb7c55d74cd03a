"""Install a seccomp listener that answers system calls for others."""

import ctypes
import struct

from cloister.prove.inside.support import Box, in_child, syscall

ID = "kernel-seccomp-listener"
TITLE = "Install a seccomp listener that answers system calls for others"
PROMISE = "P-035"
CLASSES = (30,)
EXPECT = "seccomp answers EPERM; plain filters may be added"
SHAPE = "any"


def attack(box: Box) -> None:
    """A filter that allows everything, with the flag NEW_LISTENER."""
    for flags in (8, 8 | 16, 8 | 1):
        box.refused(f"flags {flags:#x}", "EPERM", in_child, install, flags)


def install(flags: int) -> None:
    """Call seccomp(SECCOMP_SET_MODE_FILTER) with `return ALLOW`."""
    syscall("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which filters need privilege
    code = ctypes.create_string_buffer(struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000))
    syscall("seccomp", 1, flags, struct.pack("<HxxxxxxQ", 1, ctypes.addressof(code)))


def twin(box: Box) -> None:
    """A program may narrow itself further."""
    in_child(lambda: install(0))
    box.works("a plain filter", True)
