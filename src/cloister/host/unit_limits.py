"""Which limits of a unit the kernel keeps: read back from its cgroups (v1 and v2) and from its first process.

systemd takes MemoryMax= and its like also where it has no controller for them, and says nothing. Nothing is decided
here, and nothing changed.

Sources: systemd.resource-control(5), cgroup-v2.rst, cgroup-v1/memory.rst, sched-bwc.rst, proc(5), systemd.time(7).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_ROOT = "/sys/fs/cgroup"
_MORE = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {
    "us": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0,
    "month": 2629800.0, "y": 31557600.0,
}  # fmt: skip
_PROCESS = {"LimitCORE": "Max core file size", "LimitNOFILE": "Max open files"}


class Cgroups(NamedTuple):
    """Where a process is: directories of its cgroup by controller (v1), and of the one tree of v2, if it is there."""

    trees: Mapping[str, str]
    unified: str

    def read(self, controller: str, name_v1: str, name_v2: str) -> str:
        """Return the content of the file that a controller has for this; empty where it is not there."""
        if tree := self.trees.get(controller):
            return _read(f"{tree}/{name_v1}") if name_v1 else ""
        return _read(f"{self.unified}/{name_v2}") if self.unified else ""


def cgroups_of(pid: int, unit: str, root: str = _ROOT, proc: str = "/proc") -> Cgroups:
    """Return the cgroups of a unit's process. A tree in which it is somewhere else (systemd left it there) is none."""
    trees: dict[str, str] = {}
    unified = ""
    for line in _read(f"{proc}/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        inside = path.endswith(f"/{unit}")
        if not controllers:
            base = f"{root}/unified" if os.path.isdir(f"{root}/unified") else root
            unified = f"{base}{path}" if inside else ""
        for controller in filter(None, controllers.split(",")):
            trees[controller] = f"{root}/{controller}{path}" if inside else "/nowhere"
    return Cgroups(trees, unified)


def not_in_force(properties: Sequence[tuple[str, str]], cgroups: Cgroups, swaps: str = "/proc/swaps") -> list[str]:
    """Return the names of asked limits that the kernel does not keep."""
    asked = dict(properties)
    return [name for name, holds in _HOLDS.items() if name in asked and not holds(asked[name], cgroups, swaps)]


def process_limits_wrong(properties: Sequence[tuple[str, str]], pid: int, proc: str = "/proc") -> str:
    """Return the name of a limit (setrlimit(2)) that a process does not have as it was asked for; empty: none."""
    asked = dict(properties)
    lines = _read(f"{proc}/{pid}/limits").splitlines()
    for name, shown in _PROCESS.items():
        if name in asked:
            words = next((line[len(shown) :].split() for line in lines if line.startswith(shown)), [])
            wanted = "unlimited" if asked[name] == "infinity" else str(amount(asked[name]))
            if words[:2] != [wanted, wanted]:
                return name
    return ""


def amount(text: str) -> int:
    """Return a number as systemd reads it: K, M, G and T are powers of 1024."""
    number = text.rstrip("KMGT")
    return int(number) * _MORE[text[len(number) :]]


def seconds(text: str) -> float:
    """Return a time span of systemd's (`1h 30.5s`) in seconds.

    Raises:
        ValueError: it is none.
    """
    if text == "infinity":
        return float("inf")
    parts = re.findall(r"([0-9.]+)\s*([a-z]*)", text)
    if not parts or any(unit not in _SECONDS for _, unit in parts):
        raise ValueError(text)
    return float(sum(float(number) * _SECONDS[unit] for number, unit in parts))


def _memory(asked: str, cgroups: Cgroups, swaps: str) -> bool:
    del swaps
    found = cgroups.read("memory", "memory.limit_in_bytes", "memory.max")
    if asked == "infinity":
        return True
    # The kernel keeps whole pages.
    return found.isdecimal() and amount(asked) - os.sysconf("SC_PAGE_SIZE") < int(found) <= amount(asked)


def _swap(asked: str, cgroups: Cgroups, swaps: str) -> bool:
    """Where nothing is ever swapped out, swap needs no limit; v1 cannot be told by systemd."""
    found = cgroups.read("memory", "", "memory.swap.max")
    return found == asked or len(_read(swaps).splitlines()) <= 1


def _tasks(asked: str, cgroups: Cgroups, swaps: str) -> bool:
    del swaps
    return asked == "infinity" or cgroups.read("pids", "pids.max", "pids.max") == asked


def _cpu(asked: str, cgroups: Cgroups, swaps: str) -> bool:
    del swaps
    quota, _, period = cgroups.read("cpu", "cpu.cfs_quota_us", "cpu.max").partition(" ")
    period = period or cgroups.read("cpu", "cpu.cfs_period_us", "")
    if not quota.isdecimal() or not period.isdecimal():
        return False
    return int(quota) / int(period) <= float(asked.rstrip("%")) / 100 + 0.01


def _disks(asked: str, cgroups: Cgroups, swaps: str) -> bool:
    del swaps
    # systemd turns the weight into one of v1's scale (cgroup-util.h, CGROUP_WEIGHT_IO_TO_BLKIO).
    wanted = str(min(max(int(asked) * 5, 10), 1000)) if "blkio" in cgroups.trees else asked
    found = cgroups.read("blkio", "blkio.weight", "io.weight")
    return found.removeprefix("default ").partition("\n")[0] == wanted


_HOLDS: dict[str, Callable[[str, Cgroups, str], bool]] = {
    "MemoryMax": _memory,
    "MemorySwapMax": _swap,
    "TasksMax": _tasks,
    "CPUQuota": _cpu,
    "IOWeight": _disks,
}


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return ""
