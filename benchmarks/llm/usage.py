"""What processes use: CPU time and memory of a process with its children, and how busy the machine is otherwise."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for member in found:
        with contextlib.suppress(OSError):
            for task in (PROC / str(member) / "task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """Return the seconds that processes have spent on a CPU, with threads that have ended (proc_pid_stat(5))."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            words = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            total += int(words[11]) + int(words[12])
    return total / TICKS


def memory_mb(pids: Iterable[int]) -> float:
    """Return the proportional set size in MB; of processes that forbid looking, the resident set, which is more."""
    total = 0
    for pid in pids:
        try:
            rollup = (PROC / str(pid) / "smaps_rollup").read_text()
            total += 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration):
            with contextlib.suppress(OSError):
                total += PAGE * int((PROC / str(pid) / "statm").read_text().split()[1])
    return total / 1e6


def busy_s() -> float:
    """Return the seconds that all CPUs of the machine have been busy, or taken away by its host."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(word) for word in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS


def let_run_on(pids: Iterable[int], cores: Iterable[int]) -> None:
    """Pin processes, with all their threads, to some cores."""
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in (PROC / str(pid) / "task").iterdir():
                os.sched_setaffinity(int(task.name), set(cores))


class Clocks(NamedTuple):
    """What was used until now: by the machine, by those that take part, and the time."""

    busy: float
    ours: float
    at: float

    def foreign_until(self, later: Clocks) -> float:
        """Return how many cores others kept busy between two readings."""
        return max(0.0, (later.busy - self.busy - (later.ours - self.ours)) / max(1e-9, later.at - self.at))
