"""Trace another process."""

import os
import subprocess

from cloister.prove.inside.support import Box, in_child, syscall

ID = "kernel-ptrace"
TITLE = "Trace another process"
PROMISE = "P-034"
CLASSES = (25,)
EXPECT = "seccomp answers EPERM"
LIFTED_BY = ("hardening.ptrace",)


def attack(box: Box) -> None:
    """Attach to and seize PID 1, the parent and a child; ask to be traced."""
    with subprocess.Popen(["/bin/sleep", "30"]) as child:
        for name, pid in (("PID 1", 1), ("the driver", os.getppid()), ("a child", child.pid)):
            box.refused(f"attach to {name}", "EPERM", syscall, "ptrace", 16, pid, 0, 0)
            box.refused(f"seize {name}", "EPERM", syscall, "ptrace", 16902, pid, 0, 0)
        child.kill()
    box.refused("traceme", "EPERM", in_child, syscall, "ptrace", 0, 0, 0, 0)


def twin(box: Box) -> None:
    """Signals to an own child work."""
    with subprocess.Popen(["/bin/sleep", "30"]) as child:
        child.terminate()
        box.works("a signal", child.wait() == -15)
