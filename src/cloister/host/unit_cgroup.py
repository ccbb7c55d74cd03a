"""The cgroup of a unit of ours, as anybody may look at it: whether it lives, and which limits it ran into.

Nothing is asked of systemd, and nothing changed.
"""

from __future__ import annotations

import contextlib
import os

from cloister.host import limits
from cloister.plan.unit import SLICE

_ROOT = "/sys/fs/cgroup"
_TREES = (_ROOT, f"{_ROOT}/systemd", f"{_ROOT}/unified")
"""Where systemd's own tree is: with cgroup v2 alone, and in the two layouts beside v1 (file-hierarchy(7))."""


def is_alive(unit: str) -> bool:
    """Say whether the unit's cgroup is there; systemd removes it when the last process has ended."""
    return any(os.path.isdir(f"{tree}/{SLICE}/{unit}") for tree in _TREES)


def limits_reached(unit: str) -> tuple[str, ...]:
    """Return in words which limits the unit ran into so far; v1 controllers have trees of their own."""
    found = limits.reached(f"{_ROOT}/{SLICE}/{unit}")
    return found or limits.reached(
        f"{_ROOT}/memory/{SLICE}/{unit}", f"{_ROOT}/pids/{SLICE}/{unit}", memory_file="memory.oom_control"
    )


def memory_peak(unit: str) -> int:
    """Return the most memory that the unit had in use, in bytes; 0 where the kernel does not say (v2: Linux 5.19)."""
    places = (f"{_ROOT}/{SLICE}/{unit}/memory.peak", f"{_ROOT}/memory/{SLICE}/{unit}/memory.max_usage_in_bytes")
    for place in places:
        with contextlib.suppress(OSError, ValueError), open(place, encoding="ascii") as file:
            return int(file.read())
    return 0
