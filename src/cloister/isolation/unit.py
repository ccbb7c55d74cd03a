"""The `unit` backend: the properties of a transient unit for an agent, by version of systemd.

Most are fixed and stand in `unit_properties.toml`; here is what depends on the run: account, root
directory, what the service manager itself mounts, address families and limits. What must be mounted by
descriptor (workspace, state, home) is `plan.unit.UnitMount`, laid out in `runs/compile_unit.py`.

Nothing runs here, and nothing is believed: `host/unit_floor.py` holds the result against minimums of its own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from cloister.errors import UnsupportedError
from cloister.plan.unit import SKELETON

OLDEST = 252
"""Debian 12. Older ones lack PrivateIPC= with a root directory, and are not tried."""
SHIM = "/.cloister/cloister-shim"
"""Where the shim appears in a unit."""
_TABLE = Path(__file__).with_name("unit_properties.toml")
_PLAIN = re.compile(r"/[^\s:%\\\"'$]*")
"""Paths that need no quoting in a property; ours and the system's are of this form."""

Lift = Literal["", "nested", "write-execute", "internet"]


class Property(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the table."""

    name: str
    value: str
    why: str
    since: int = OLDEST
    before: int | None = None
    lift: Lift = ""
    only: Lift = ""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    property: tuple[Property, ...]


class UnitLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the run may use up: bytes, tasks, percent of one processor, seconds, descriptors, share of the disks."""

    memory_bytes: int | None = None
    tasks: int | None = None
    cpu_percent: int | None = None
    runtime_s: float | None = None
    open_files: int | None = None
    io_weight: int | None = None
    oom: str = "kill"


_SHARED_UMASK = "0007"
"""With a group that shares the workspace: what an agent makes there is for all of them, or it would be nobody's."""


class UnitBox(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides the properties of a unit, as facts and choices already made."""

    systemd: int
    account: str
    shim: str
    """On the host."""
    etc_directory: str
    merged_usr: bool
    nested: bool = False
    netlink: bool = True
    write_execute: bool = True
    internet: bool = False
    """Its network namespace has an interface (`unit_network`); without, nothing but loopback."""
    tmpfs_bytes: int | None = None
    groups: tuple[str, ...] = ()
    limits: UnitLimits = UnitLimits()


@cache
def table() -> tuple[Property, ...]:
    """Return the fixed properties."""
    raw = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    return msgspec.convert(raw, _Table).property


def properties(box: UnitBox) -> tuple[tuple[str, str], ...]:
    """Return the properties, in order, as for `systemd-run -p`.

    Raises:
        UnsupportedError: the host's systemd is too old, or a path of ours cannot be written in a property.
    """
    if box.systemd < OLDEST:
        raise UnsupportedError(
            "systemd-too-old",
            f'isolation = "unit" needs systemd {OLDEST} or newer, and this is {box.systemd}',
            remedy='update the host, or isolation = "namespace"',
        )
    return (*_identity(box), *_fixed(box), *_mounts(box), *_families(box), *_limits(box.limits))


def _identity(box: UnitBox) -> Iterator[tuple[str, str]]:
    yield "User", box.account
    yield "Group", box.account
    if box.groups:
        yield "SupplementaryGroups", " ".join(box.groups)


def _fixed(box: UnitBox) -> Iterator[tuple[str, str]]:
    chosen = {"nested": box.nested, "write-execute": box.write_execute, "internet": box.internet}
    for one in table():
        there = one.since <= box.systemd and (one.before is None or box.systemd < one.before)
        if there and not chosen.get(one.lift, False) and chosen.get(one.only, True):
            yield one.name, _SHARED_UMASK if one.name == "UMask" and box.groups else one.value


def system_mounts(box: UnitBox) -> Iterator[tuple[str, str]]:
    """Yield the root and what the manager mounts on it of the system: its directories, the assembled `/etc`, our shim.

    Raises:
        UnsupportedError: a path of ours cannot be written in a property.
    """
    yield "RootDirectory", SKELETON
    yield "WorkingDirectory", "/"
    yield "BindReadOnlyPaths", "/usr"
    if not box.merged_usr:
        for name in ("bin", "sbin", "lib", "lib64", "lib32", "libx32"):
            yield "BindReadOnlyPaths", f"-/{name}"
    yield "BindReadOnlyPaths", f"{_plain(box.etc_directory)}:/etc"
    yield "BindReadOnlyPaths", f"{_plain(box.shim)}:{SHIM}"


def _mounts(box: UnitBox) -> Iterator[tuple[str, str]]:
    yield from system_mounts(box)
    # PrivateDevices= brings the host's /dev/shm along, which all users share.
    size = f",size={box.tmpfs_bytes}" if box.tmpfs_bytes is not None else ""
    yield "TemporaryFileSystem", f"/dev/shm:mode=1777,nosuid,nodev{size}"  # noqa: S108  # the unit's own


def _families(box: UnitBox) -> Iterator[tuple[str, str]]:
    netlink = " AF_NETLINK" if box.netlink else ""
    yield "RestrictAddressFamilies", f"AF_UNIX AF_INET AF_INET6{netlink}"


def _limits(limits: UnitLimits) -> Iterator[tuple[str, str]]:
    yield "OOMPolicy", limits.oom
    if limits.memory_bytes is not None:
        yield "MemoryMax", str(limits.memory_bytes)
        yield "MemorySwapMax", "0"  # else the limit would be memory plus all swap
    if limits.tasks is not None:
        yield "TasksMax", str(limits.tasks)
    if limits.cpu_percent is not None:
        yield "CPUQuota", f"{limits.cpu_percent}%"
    if limits.io_weight is not None:
        yield "IOWeight", str(limits.io_weight)
    if limits.runtime_s is not None:
        yield "RuntimeMaxSec", f"{limits.runtime_s:.3f}".rstrip("0").rstrip(".") + "s"
    if limits.open_files is not None:
        yield "LimitNOFILE", str(limits.open_files)


def _plain(path: str) -> str:
    if not _PLAIN.fullmatch(path):
        raise UnsupportedError(
            "unit-path", "a path of Cloister's own holds spaces or signs that systemd gives a meaning",
            where=path, remedy="install Cloister elsewhere, such as /opt/cloister",
        )  # fmt: skip
    return path
