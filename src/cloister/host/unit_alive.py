"""Whether a unit of ours still has processes, seen from its cgroup. Anybody may look; nothing is asked of systemd."""

from __future__ import annotations

import os

from cloister.plan.unit import SLICE

_TREES = ("/sys/fs/cgroup", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified")
"""Where systemd's own tree is: with cgroup v2 alone, and in the two layouts beside v1 (file-hierarchy(7))."""


def is_alive(unit: str) -> bool:
    """Say whether the unit's cgroup is there; systemd removes it when the last process has ended."""
    return any(os.path.isdir(f"{tree}/{SLICE}/{unit}") for tree in _TREES)
