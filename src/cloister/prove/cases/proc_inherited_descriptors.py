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
            box.must(fine, f"{'own' if pid == os.getpid() else 'driver'} {number}: {target}")
            if pid == os.getpid() and stat.S_ISDIR(os.fstat(number).st_mode if fine is False else 0):
                box.breach(read(f"/proc/self/fd/{number}{box.fact('secret')}"))
