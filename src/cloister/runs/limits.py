"""Limits of a run: a cgroup where the host gives one, rlimits otherwise, and words that say which.

A cgroup comes from the systemd manager, as a scope, or is made in a directory where we may. A
limit that nothing can keep is refused: an agent that was promised a ceiling must have one.
Sources: cgroup-v2 (Documentation/admin-guide/cgroup-v2.rst), systemd.scope(5), setrlimit(2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from cloister.errors import UnsupportedError
from cloister.plan.facts import HostFacts
from cloister.plan.steps import LimitCgroup, LimitScope
from cloister.policy.model import Limits
from cloister.policy.units import parse_cpu, parse_duration, parse_size

_PERIOD_US = 100_000
_NO_CGROUP = "no cgroup is to be had: memory is limited per process, not for all together"


class Means(NamedTuple):
    """How this host gives a run a cgroup of its own."""

    by: str = ""
    """`scope`: the systemd manager makes it. `cgroup`: we make it, in `base`. Empty: there is no way."""
    controllers: tuple[str, ...] = ()
    base: str = ""


def means(host: HostFacts) -> Means:
    """Return the way to a cgroup on this host: systemd's first, since on its hosts the tree is its own."""
    if host.cgroup.manager:
        return Means("scope", host.cgroup.manager)
    if host.cgroup.base:
        return Means("cgroup", host.cgroup.controllers, host.cgroup.base)
    return Means()


class Limited(msgspec.Struct, frozen=True, kw_only=True):
    """Limits as the backends take them."""

    cgroup: LimitCgroup | LimitScope | None
    rlimits: tuple[tuple[str, int], ...]
    disk_bytes: int | None
    runtime_s: float | None
    words: tuple[str, ...]
    notices: tuple[str, ...]


def compile_limits(limits: Limits, *, means: Means, run: str, is_root: bool) -> Limited:
    """Return what enforces each limit.

    Raises:
        UnsupportedError: `enforce = "cgroup"` without a cgroup to be had, or a limit that needs one.
    """
    memory = parse_size(limits.memory_max) if limits.memory_max else None
    quota = parse_cpu(limits.cpu_quota) * _PERIOD_US // 100 if limits.cpu_quota else None
    values = {"memory": memory, "pids": limits.tasks_max, "cpu": quota}
    wanted = {controller for controller, value in values.items() if value is not None}
    step: LimitCgroup | LimitScope | None = None
    if wanted and wanted <= set(means.controllers):
        if means.by == "scope":
            step = LimitScope(
                unit=f"cloister-{run}.scope", memory_bytes=memory, tasks=limits.tasks_max, cpu_quota_us=quota
            )
        else:
            path = f"{means.base}/cloister-{run}"
            step = LimitCgroup(path=path, memory_bytes=memory, tasks=limits.tasks_max, cpu_quota_us=quota)
    elif wanted:
        _refuse_without_cgroup(limits, is_root=is_root)
    return Limited(
        cgroup=step,
        rlimits=_rlimits(limits, memory, everything=step is None),
        disk_bytes=parse_size(limits.disk_max) if limits.disk_max else None,
        runtime_s=parse_duration(limits.runtime_max) if limits.runtime_max else None,
        words=tuple(_words(limits, mechanism(step))),
        notices=() if step or not wanted else (_NO_CGROUP,),
    )


def mechanism(step: LimitCgroup | LimitScope | None) -> str:
    """Return what the receipt calls it; empty for none."""
    match step:
        case LimitScope():
            return "cgroup (systemd scope)"
        case LimitCgroup():
            return "cgroup"
        case _:
            return ""


def _rlimits(limits: Limits, memory: int | None, *, everything: bool) -> tuple[tuple[str, int], ...]:
    """Return rlimits: always no core dumps, and what the cgroup would do where there is none."""
    wanted = {"core": 0, "nofile": limits.open_files}
    if everything:
        wanted |= {"data": memory, "nproc": limits.tasks_max}
    return tuple((name, value) for name, value in wanted.items() if value is not None)


def _words(limits: Limits, cgroup: str) -> Iterator[str]:
    """Say of each limit what keeps it."""
    yield "core dumps: off (rlimit)"
    if limits.memory_max:
        yield f"memory_max {limits.memory_max}: {cgroup or 'rlimit, per process (RLIMIT_DATA)'}"
    if limits.tasks_max is not None:
        yield f"tasks_max {limits.tasks_max}: {cgroup or 'rlimit (RLIMIT_NPROC, user namespace)'}"
    if limits.cpu_quota:
        yield f"cpu_quota {limits.cpu_quota}: {cgroup}"
    if limits.open_files is not None:
        yield f"open_files {limits.open_files}: rlimit"
    if limits.disk_max:
        yield f"disk_max {limits.disk_max}: size of the home's and of /tmp's file system"
    if limits.runtime_max:
        yield f"runtime_max {limits.runtime_max}: broker, exit code 124"


def _refuse_without_cgroup(limits: Limits, *, is_root: bool) -> None:
    remedy = "cloister doctor"
    if limits.enforce == "cgroup":
        raise UnsupportedError(
            "cgroup-missing",
            "the policy wants limits in a cgroup and none with these controllers is to be had",
            remedy=remedy,
        )
    if limits.cpu_quota:
        raise UnsupportedError(
            "cpu-quota-unenforceable",
            "cpu_quota needs a cgroup with the cpu controller and there is none",
            where=".limits.cpu_quota",
            remedy=remedy,
        )
    if limits.tasks_max is not None and is_root:
        # The kernel exempts the root user from RLIMIT_NPROC (kernel/fork.c, copy_process).
        raise UnsupportedError(
            "tasks-max-unenforceable", "root is exempt from RLIMIT_NPROC and no cgroup is to be had",
            where=".limits.tasks_max", remedy="run as an ordinary user, or remove tasks_max",
        )  # fmt: skip
