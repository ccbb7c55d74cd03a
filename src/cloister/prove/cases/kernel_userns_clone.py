"""Make a user namespace with clone."""

import os
import threading

from cloister.prove.inside.support import Box, syscall

ID = "kernel-userns-clone"
TITLE = "Make a user namespace with clone"
PROMISE = "P-033"
CLASSES = (27,)
EXPECT = "seccomp answers EPERM"
SHAPE = "any"
LIFTED_BY = ("hardening.nested",)


KINDS = (0x10000000, 0x10000000 | 0x20000, 0x20000, 0x40000000, 0x20000000, 0x8000000)


def attack(box: Box) -> None:
    """Clone a child with each flag; a child that comes to life says that it worked."""
    for flags in KINDS:
        box.refused(f"clone({flags:#x})", "EPERM", clone, flags)


def clone(flags: int) -> None:
    """Fork by the call itself, with a flag; the child ends at once."""
    pid = syscall("clone", flags | 17, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def twin(box: Box) -> None:
    """Threads use the same call."""
    seen: list[int] = []
    thread = threading.Thread(target=seen.append, args=(1,))
    thread.start()
    thread.join()
    box.works("a thread", seen == [1])
