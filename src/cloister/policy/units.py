"""Sizes, durations and CPU shares: from the text of a policy to numbers with a unit in their name.

Each parser raises ValueError with a sentence for people; putting a file and a line to it is
for `check`. Spellings follow systemd where systemd has them (systemd.time(7),
MemoryMax= and CPUQuota= in systemd.resource-control(5)), without its "infinity": a limit
that is not wanted is left out.
"""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]{1,12})([KMGT])(?:i?B)?")
_FACTOR = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_DURATION = re.compile(r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?")
_SECONDS = (86400, 3600, 60, 1)
_CPU = re.compile(r"([0-9]{1,6})%")


def parse_size(text: str) -> int:
    """Return bytes: "512M" is 536870912. The unit (K, M, G, T: powers of 1024) is required, zero is refused."""
    found = _SIZE.fullmatch(text)
    if not found or int(found[1]) == 0:
        raise ValueError("a size is a number with K, M, G or T, such as 512M or 4G")
    return int(found[1]) * _FACTOR[found[2]]


def parse_duration(text: str) -> int:
    """Return seconds: "1h30m" is 5400. Units are d, h, m and s, in this order; zero is refused."""
    found = _DURATION.fullmatch(text)
    seconds = sum(int(part or 0) * each for part, each in zip(found.groups(), _SECONDS, strict=True)) if found else 0
    if not seconds:
        raise ValueError("a duration is a number with d, h, m or s, such as 90s, 10m, 8h or 1h30m")
    return seconds


def parse_cpu(text: str) -> int:
    """Return percent of one CPU: "150%" is 150, one and a half CPUs. Zero is refused."""
    found = _CPU.fullmatch(text)
    if not found or int(found[1]) == 0:
        raise ValueError("a CPU share is a percentage of one CPU, such as 50% or 200%")
    return int(found[1])
