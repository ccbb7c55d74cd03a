"""Set the host's clock."""

import time

from cloister.prove.inside.support import Box, syscall

ID = "kernel-clock"
TITLE = "Set the host's clock"
PROMISE = "P-035"
CLASSES = (28,)
EXPECT = "seccomp answers EPERM"
SHAPE = "any"


def attack(box: Box) -> None:
    """Set the time to what it is; adjust nothing."""
    now = time.clock_gettime(time.CLOCK_REALTIME)
    box.refused("clock_settime", "EPERM", time.clock_settime, time.CLOCK_REALTIME, now)
    box.refused("adjtimex", "EPERM", syscall, "adjtimex", bytes(208))
    box.refused("settimeofday", "EPERM", syscall, "settimeofday", bytes(16), 0)


def twin(box: Box) -> None:
    """Reading it works."""
    box.works("the time", time.time() > 0)
