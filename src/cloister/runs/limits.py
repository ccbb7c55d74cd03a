"""Limits of a run: a delegated cgroup where the host gives one, rlimits otherwise, and words that say which.

A limit that neither can keep is refused: an agent that was promised a ceiling must have one.
Sources: cgroup-v2 (Documentation/admin-guide/cgroup-v2.rst), setrlimit(2).
"""

from __future__ import annotations

import msgspec

from cloister.errors import UnsupportedError
from cloister.plan.steps import LimitCgroup
from cloister.policy.model import Limits
from cloister.policy.units import parse_cpu, parse_duration, parse_size

_PERIOD_US = 100_000


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
    disk = parse_size(limits.disk_max) if limits.disk_max else None
    runtime = parse_duration(limits.runtime_max) if limits.runtime_max else None
    wanted = memory is not None or limits.tasks_max is not None or quota is not None
    if wanted and not cgroup:
        _refuse_without_cgroup(limits, is_root=is_root)
    step = None
    if wanted and cgroup:
        step = LimitCgroup(
            path=f"{cgroup}/cloister-{run}", memory_bytes=memory, tasks=limits.tasks_max, cpu_quota_us=quota
        )
    rlimits = [("core", 0)]
    words = ["core dumps: off (rlimit)"]
    by = "cgroup" if step else "rlimit"
    if memory is not None:
        words.append(f"memory_max {limits.memory_max}: {by}" + ("" if step else ", per process (RLIMIT_DATA)"))
        if not step:
            rlimits.append(("data", memory))
    if limits.tasks_max is not None:
        words.append(f"tasks_max {limits.tasks_max}: {by}" + ("" if step else " (RLIMIT_NPROC in the user namespace)"))
        if not step:
            rlimits.append(("nproc", limits.tasks_max))
    if quota is not None:
        words.append(f"cpu_quota {limits.cpu_quota}: cgroup")
    if limits.open_files is not None:
        rlimits.append(("nofile", limits.open_files))
        words.append(f"open_files {limits.open_files}: rlimit")
    if disk is not None:
        words.append(f"disk_max {limits.disk_max}: size of the home's and of /tmp's file system")
    if runtime is not None:
        words.append(f"runtime_max {limits.runtime_max}: broker, exit code 124")
    notices: tuple[str, ...] = ()
    if wanted and not step:
        notices = ("no cgroup is delegated: memory is limited per process, not for all together",)
    return Limited(
        cgroup=step, rlimits=tuple(rlimits), disk_bytes=disk, runtime_s=runtime, words=tuple(words), notices=notices
    )


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
