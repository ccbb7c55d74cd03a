"""Finding the first process of a sandbox from outside: PID 1 of its namespace, below the outer shim. Reads only."""

from __future__ import annotations

_MAX_DEPTH = 6
"""Outer shim, bubblewrap, and what bubblewrap forks on its way: three levels in version 0.8."""


def find_sandbox_pid(outer: int) -> int:
    """Return the host's number of the sandbox's PID 1, or 0 where there is none (proc(5), `children` and `NSpid`)."""
    level = [outer]
    for _ in range(_MAX_DEPTH):
        level = [child for pid in level for child in _children(pid)]
        for pid in level:
            if _number_inside(pid) == 1:
                return pid
    return 0


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _number_inside(pid: int) -> int:
    """Return the process's number in its innermost namespace; 0 for one that has only the host's."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("NSpid:"):
                    numbers = line.split()[1:]
                    return int(numbers[-1]) if len(numbers) > 1 else 0
    except (OSError, ValueError):
        return 0
    return 0
