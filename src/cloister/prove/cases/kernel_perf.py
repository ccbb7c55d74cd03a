"""Watch the machine with perf_event_open."""

import os
import struct

from cloister.prove.inside.support import Box, syscall

ID = "kernel-perf"
TITLE = "Watch the machine with perf_event_open"
PROMISE = "P-035"
CLASSES = (28,)
EXPECT = "seccomp answers EPERM"
SHAPE = "any"


def attack(box: Box) -> None:
    """A software counter on the own process is what is allowed first anywhere."""
    attribute = struct.pack("<IIQ", 1, 112, 0).ljust(112, b"\0")
    for pid in (0, 1, os.getppid()):
        box.refused(f"perf_event_open({pid})", "EPERM", syscall, "perf_event_open", attribute, pid, -1, -1, 0)
