"""Trace another process."""

import os
import subprocess

from cloister.prove.inside.support import Box, in_child, syscall

ID = "kernel-ptrace"
TITLE = "Trace another process"
PROMISE = "P-034"
CLASSES = (25,)
EXPECT = "seccomp answers EPERM"
SHAPE = "any"
LIFTED_BY = ("hardening.ptrace",)


def attack(box: Box) -> None:
    """Ask to be traced, attach to a child; then seize, which stops nobody, the driver and PID 1."""
    box.refused("traceme", "EPERM", in_child, syscall, "ptrace", 0, 0, 0, 0)
    with subprocess.Popen(["/bin/sleep", "30"]) as child:
        box.refused("seize a child", "EPERM", syscall, "ptrace", 0x4206, child.pid, 0, 0)
        box.refused("attach to a child", "EPERM", syscall, "ptrace", 16, child.pid, 0, 0)
        child.kill()
    for name, pid in (("PID 1", 1), ("the driver", os.getppid())):
        box.refused(f"seize {name}", "EPERM", syscall, "ptrace", 0x4206, pid, 0, 0)


def twin(box: Box) -> None:
    """Signals to an own child work."""
    with subprocess.Popen(["/bin/sleep", "30"]) as child:
        child.terminate()
        box.works("a signal", child.wait() == -15)
