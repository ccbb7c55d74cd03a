"""Use descriptors that the caller had open: a directory of the host, a secret."""

import os
import stat

from cloister.prove.inside.support import Box, read

ID = "proc-inherited-descriptors"
TITLE = "Use descriptors that the caller had open: a directory of the host, a secret"
PROMISE = "P-040"
CLASSES = (39,)
EXPECT = "all but the three standard ones are closed"
SHAPE = "any"


def attack(box: Box) -> None:
    """Whatever is open here or in the driver must be a pipe, /dev/null or the case's own."""
    for pid in (os.getpid(), os.getppid()):
        for number in sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd")):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{number}")
            except FileNotFoundError:
                continue
            fine = target.startswith(("pipe:", "/dev/null", f"/proc/{pid}/fd", f"/proc/{os.getpid()}/fd"))
            fine = fine or _opened_by_a_library(pid, number, target)
            box.must(fine, f"{'own' if pid == os.getpid() else 'driver'} {number}: {target}")
            if pid == os.getpid() and stat.S_ISDIR(os.fstat(number).st_mode if fine is False else 0):
                box.breach(read(f"/proc/self/fd/{number}{box.fact('secret')}"))


def _opened_by_a_library(pid: int, number: int, target: str) -> bool:
    """Whether it is a library that the process runs and that is there for it by name, open for reading: no caller's.

    From 3.5 on, libffi keeps itself open for its trampolines (src/tramp.c), so every Python with ctypes does.
    """
    name = os.path.basename(target)
    if not name.startswith("libffi.so."):
        return False
    held, there = os.stat(f"/proc/{pid}/fd/{number}"), os.stat(target)
    flags = int(read(f"/proc/{pid}/fdinfo/{number}").split("flags:")[1].split()[0], 8)
    mapped = any(line.endswith(f" {target}") for line in read(f"/proc/{pid}/maps", 1 << 20).splitlines())
    return mapped and os.path.samestat(held, there) and stat.S_ISREG(held.st_mode) and not flags & os.O_ACCMODE
