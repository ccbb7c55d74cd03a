"""Leave a daemon behind that outlives the run."""

import os
import signal
import time

from cloister.prove.inside.support import Box

ID = "proc-survivor"
TITLE = "Leave a daemon behind that outlives the run"
PROMISE = "P-066"
CLASSES = (36,)
EXPECT = "the kernel ends everything in the PID namespace with its first process"
FRESH = True
CHECKS = ("no-survivor", "runtime-empty", "no-mounts", "no-placeholders")


def attack(box: Box) -> None:
    """Fork twice, new sessions, deaf to signals, standard streams closed, in several copies."""
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in range(1, 65):
                    try:
                        signal.signal(number, signal.SIG_IGN)
                    except (OSError, ValueError):
                        continue
                os.closerange(0, 256)
                os.execv(
                    "/usr/bin/python3",
                    ["python3", "-I", "-S", "-c", "import time; time.sleep(300)", "cloister-prove-was-here-process"],
                )
            os._exit(0)
    time.sleep(0.2)
    box.stopped("three daemons: none may be there after the run")
