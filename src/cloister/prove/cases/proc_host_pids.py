"""See or signal processes of the host."""

import os
import signal

from cloister.prove.inside.support import Box, CannotRunError

ID = "proc-host-pids"
TITLE = "See or signal processes of the host"
PROMISE = "P-032"
CLASSES = (35,)
EXPECT = "an own PID namespace and an own /proc"
SHAPE = "any"


def attack(box: Box) -> None:
    """A process of the host by number, and whatever /proc shows."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    box.must(len(pids) < 30, f"{len(pids)} processes in /proc")
    if os.path.exists("/proc/1"):
        with open("/proc/1/status") as file:
            name = file.readline().split()[1]
        box.must(name not in ("systemd", "init"), f"PID 1 is {name}")
    with open("/proc/self/status") as file:
        levels = next(line for line in file if line.startswith("NSpid:")).split()[1:]
    box.must(len(levels) == 1, f"NSpid shows {len(levels)} level")
    host = int(box.fact("host_pid"))
    if host in pids:
        with open(f"/proc/{host}/cmdline", "rb") as command:
            if b"cloister-prove-canary" not in command.read():
                raise CannotRunError(f"pid {host} exists inside as well")
        box.breach(f"the host's process {host} is visible")
    for number in (0, signal.SIGTERM, signal.SIGKILL):
        box.refused(f"signal {int(number)} to {host}", "ESRCH EPERM", os.kill, host, number)


def twin(box: Box) -> None:
    """Own processes are seen."""
    box.works("/proc/self", os.path.exists(f"/proc/{os.getpid()}"))
