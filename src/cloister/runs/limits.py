"""Limits of a run: a delegated cgroup where the host gives one, rlimits otherwise, and words that say which.

A limit that neither can keep is refused: an agent that was promised a ceiling must have one.
Sources: cgroup-v2 (Documentation/admin-guide/cgroup-v2.rst), setrlimit(2).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cloister.errors import UnsupportedError
from cloister.plan.steps import LimitCgroup
from cloister.policy.model import Limits
from cloister.policy.units import parse_cpu, parse_duration, parse_size

_PERIOD_US = 100_000
_NO_CGROUP = "no cgroup is delegated: memory is limited per process, not for all together"


class Limited(msgspec.Struct, frozen=True, kw_only=True):
    """Limits as the backends take them."""

    cgroup: LimitCgroup | None
    rlimits: tuple[tuple[str, int], ...]
    disk_bytes: int | None
    runtime_s: float | None
    words: tuple[str, ...]
    notices: tuple[str, ...]


def compile_limits(limits: Limits, *, cgroup: str, run: str, is_root: bool) -> Limited:
    """Return what enforces each limit.

    Raises:
        UnsupportedError: `enforce = "cgroup"` without a delegated cgroup, or a limit that needs one.
    """
    memory = parse_size(limits.memory_max) if limits.memory_max else None
    quota = parse_cpu(limits.cpu_quota) * _PERIOD_US // 100 if limits.cpu_quota else None
    wanted = memory is not None or limits.tasks_max is not None or quota is not None
    step = None
    if wanted and cgroup:
        step = LimitCgroup(
            path=f"{cgroup}/cloister-{run}", memory_bytes=memory, tasks=limits.tasks_max, cpu_quota_us=quota
        )
    elif wanted:
        _refuse_without_cgroup(limits, is_root=is_root)
    rlimits = _rlimits(limits, memory, everything=step is None)
    return Limited(
        cgroup=step,
        rlimits=rlimits,
        disk_bytes=parse_size(limits.disk_max) if limits.disk_max else None,
        runtime_s=parse_duration(limits.runtime_max) if limits.runtime_max else None,
        words=tuple(_words(limits, by_cgroup=step is not None)),
        notices=() if step or not wanted else (_NO_CGROUP,),
    )


def _rlimits(limits: Limits, memory: int | None, *, everything: bool) -> tuple[tuple[str, int], ...]:
    """Return rlimits: always no core dumps, and what the cgroup would do where there is none."""
    wanted = {"core": 0, "nofile": limits.open_files}
    if everything:
        wanted |= {"data": memory, "nproc": limits.tasks_max}
    return tuple((name, value) for name, value in wanted.items() if value is not None)


def _words(limits: Limits, *, by_cgroup: bool) -> Iterator[str]:
    """Say of each limit what keeps it."""
    yield "core dumps: off (rlimit)"
    if limits.memory_max:
        yield f"memory_max {limits.memory_max}: {'cgroup' if by_cgroup else 'rlimit, per process (RLIMIT_DATA)'}"
    if limits.tasks_max is not None:
        yield f"tasks_max {limits.tasks_max}: {'cgroup' if by_cgroup else 'rlimit (RLIMIT_NPROC, user namespace)'}"
    if limits.cpu_quota:
        yield f"cpu_quota {limits.cpu_quota}: cgroup"
    if limits.open_files is not None:
        yield f"open_files {limits.open_files}: rlimit"
    if limits.disk_max:
        yield f"disk_max {limits.disk_max}: size of the home's and of /tmp's file system"
    if limits.runtime_max:
        yield f"runtime_max {limits.runtime_max}: broker, exit code 124"


def _refuse_without_cgroup(limits: Limits, *, is_root: bool) -> None:
    remedy = "log in through systemd (user manager), or run in a delegated cgroup: see cloister doctor"
    if limits.enforce == "cgroup":
        raise UnsupportedError(
            "cgroup-missing", "the policy wants limits in a cgroup and none is delegated", remedy=remedy
        )
    if limits.cpu_quota:
        raise UnsupportedError(
            "cpu-quota-unenforceable",
            "cpu_quota needs a delegated cgroup and there is none",
            where=".limits.cpu_quota",
            remedy=remedy,
        )
    if limits.tasks_max is not None and is_root:
        # The kernel exempts the root user from RLIMIT_NPROC (kernel/fork.c, copy_process).
        raise UnsupportedError(
            "tasks-max-unenforceable", "root is exempt from RLIMIT_NPROC and no cgroup is delegated",
            where=".limits.tasks_max", remedy="run as an ordinary user, or remove tasks_max",
        )  # fmt: skip
