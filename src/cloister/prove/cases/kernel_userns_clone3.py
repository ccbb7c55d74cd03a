"""Make a user namespace with clone3, whose flags a filter cannot see."""

import os
import struct

from cloister.prove.inside.support import Box, syscall

ID = "kernel-userns-clone3"
TITLE = "Make a user namespace with clone3, whose flags a filter cannot see"
PROMISE = "P-033"
CLASSES = (27,)
EXPECT = "seccomp answers ENOSYS, so that C libraries fall back to clone"
SHAPE = "any"
LIFTED_BY = ("hardening.nested",)


def attack(box: Box) -> None:
    """Pass the flag behind a pointer."""
    for flags in (0x10000000, 0x10000000 | 0x20000, 0):
        box.refused(f"clone3(flags {flags:#x})", "ENOSYS EPERM", clone3, flags)


def clone3(flags: int) -> None:
    """Fork with the first version of the arguments (64 bytes); the child ends at once."""
    arguments = struct.pack("<8Q", flags, 0, 0, 0, 17, 0, 0, 0)
    pid = syscall("clone3", arguments, len(arguments))
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def twin(box: Box) -> None:
    """The C library's own way to spawn."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    box.works("posix_spawn", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0)
