"""A fork bomb."""

import os
import signal

from cloister.prove.inside.support import Box

ID = "limits-tasks"
TITLE = "A fork bomb"
PROMISE = "P-068"
CLASSES = (85,)
EXPECT = "EAGAIN at the limit"
FRESH = True
LIFTED_BY = ("limits.tasks_max is not set",)


def attack(box: Box) -> None:
    """Bounded: a hundred more than the policy allows."""
    limit = int(box.fact("tasks_max"))
    children: list[int] = []
    try:
        while len(children) < limit + 100:
            child = os.fork()
            if child == 0:
                signal.pause()
            children.append(child)
    except BlockingIOError:
        box.stopped(f"EAGAIN: after {len(children)} processes")
    else:
        box.breach(f"{len(children)} processes, where {limit} are allowed")
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
