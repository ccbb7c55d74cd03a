"""Leave memory behind in a core dump."""

import os
import resource
import signal

from cloister.prove.inside.support import Box

ID = "proc-core-dumps"
TITLE = "Leave memory behind in a core dump"
PROMISE = "P-043"
CLASSES = (37,)
EXPECT = "the limit is zero and cannot be raised"
SHAPE = "any"


def attack(box: Box) -> None:
    """Raise the limit, then crash."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    box.must((soft, hard) == (0, 0), f"RLIMIT_CORE {soft}, {hard}")
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))
    except (ValueError, PermissionError):
        box.stopped("raising it: refused")
    else:
        box.breach("the limit could be raised")
    child = os.fork()
    if child == 0:
        os.chdir("/tmp")
        os.kill(os.getpid(), signal.SIGSEGV)
    _, status = os.waitpid(child, 0)
    box.must(not os.WCOREDUMP(status), "a crash dumps no core")
