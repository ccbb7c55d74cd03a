"""End or stop the first process of the sandbox, so that supervision is lost."""

import os
import signal
import time

from cloister.prove.inside.support import Box

ID = "proc-kill-pid1"
TITLE = "End or stop the first process of the sandbox, so that supervision is lost"
PROMISE = "P-066"
CLASSES = (86, 36)
EXPECT = "the kernel shields PID 1 from signals of its own namespace"
SHAPE = "any"


def attack(box: Box) -> None:
    """Every signal that could end or stop it; then it must still be there and running."""
    for number in (
        signal.SIGKILL,
        signal.SIGSTOP,
        signal.SIGSEGV,
        signal.SIGABRT,
        signal.SIGTRAP,
        signal.SIGXCPU,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGALRM,
        signal.SIGPIPE,
    ):
        try:
            os.kill(1, number)
        except PermissionError:
            box.stopped(f"{number.name}: EPERM")
    time.sleep(0.05)
    if not os.path.exists("/proc/1"):
        box.stopped("PID 1 is not visible")
        return
    with open("/proc/1/status") as file:
        state = next(line for line in file if line.startswith("State:")).split()[1]
    box.must(state in "SRD", f"state {state}")
