"""Firecracker under its own jailer, for root: the jailer's argv, and what must lie in the chroot that it makes.

The jailer wants root: it makes device nodes, enters the chroot BASE/firecracker/ID/root, joins a network namespace and
becomes an unprivileged user (their docs/jailer.md). A run of a user needs none of it: there Firecracker is in the jail
of every monitor (`isolation/monitor_jail.py`). Everything that Firecracker is told by its API is then relative to the
chroot. Pure; `host/firecracker_jail.py` builds it.
"""

from __future__ import annotations

import posixpath
import re
from typing import Annotated, Literal

import msgspec

from cloister.errors import UnsupportedError
from cloister.isolation.firecracker import API_SOCKET, Place, checked_id
from cloister.plan.vm import Role, VmLaunch

_NAMES: dict[Role, str] = {
    "kernel": "vmlinux",
    "initramfs": "initramfs.cpio",
    "root": "root.img",
    "var": "var.img",
    "workspace": "workspace.img",
    "memory-out": "memory.out",
    "state-out": "state.out",
}
_CGROUP = re.compile(r"[a-z]+(\.[a-z_]+)+")
_VALUE = re.compile(r"[0-9a-z][0-9a-z ,:.-]*")
Id = Annotated[int, msgspec.Meta(gt=0, le=2**32 - 2)]


class Jailed(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides the jailer's argv. It must never become root: `uid` and `gid` are above 0."""

    jailer: str
    firecracker: str
    run: str
    uid: Id
    gid: Id
    base: str
    """Directory for chroots, on the file system of the disks."""
    parent_cgroup: str
    """Below the root of cgroup v2, without a slash in front; the jailer makes one of the run's name in it."""
    cgroups: tuple[tuple[str, str], ...] = ()
    """Files of the run's cgroup, each with its value, such as `memory.max` and `536870912`."""
    netns: str = ""
    """Path of the network namespace to join; empty for that of the caller."""
    open_files: Annotated[int, msgspec.Meta(ge=64, le=65536)] = 1024
    file_bytes: int = 0
    """Size that no file it writes may exceed; 0: no bound."""


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """One file in the chroot."""

    role: Role
    name: str
    """In the chroot's root directory."""
    how: Literal["link", "copy"]
    """What is read only once and whole is copied from the verified descriptor; disks are linked by theirs."""
    write: bool
    """Whether it belongs to the jail's user; the others stay root's, readable by the jail's group."""


def jailer_argv(jailed: Jailed) -> tuple[str, ...]:
    """Return how it is started. Firecracker becomes the first process of a PID namespace, as another user.

    The jailer itself ends as soon as that is done, and leaves the pid in `pid_file`: what is left of such a machine is
    found, and killed whole, by its cgroup.

    Raises:
        UnsupportedError: a name or value that the jailer would read otherwise than it is meant.
    """
    _check(jailed)
    argv = [jailed.jailer, "--id", checked_id(jailed.run), "--exec-file", jailed.firecracker]
    argv += ["--uid", str(jailed.uid), "--gid", str(jailed.gid), "--chroot-base-dir", jailed.base]
    argv += ["--cgroup-version", "2", "--parent-cgroup", jailed.parent_cgroup]
    for name, value in jailed.cgroups:
        argv += ["--cgroup", f"{name}={value}"]
    if jailed.netns:
        argv += ["--netns", jailed.netns]
    argv += ["--resource-limit", f"no-file={jailed.open_files}"]
    if jailed.file_bytes:
        argv += ["--resource-limit", f"fsize={jailed.file_bytes}"]
    return (*argv, "--new-pid-ns", "--", "--api-sock", f"/{API_SOCKET}")


def chroot(jailed: Jailed) -> str:
    """Return the directory that Firecracker sees as `/`."""
    return f"{jailed.base}/{posixpath.basename(jailed.firecracker)}/{checked_id(jailed.run)}/root"


def pid_file(jailed: Jailed) -> str:
    """Return where the jailer writes Firecracker's pid, as the host sees it."""
    return f"{chroot(jailed)}/{posixpath.basename(jailed.firecracker)}.pid"


def placed(launch: VmLaunch) -> tuple[Placed, ...]:
    """Return what must lie in the chroot, in the order of the plan's files."""
    return tuple(
        Placed(
            role=file.role,
            name=_NAMES[file.role],
            how="copy" if file.role in {"kernel", "initramfs"} else "link",
            write=file.write,
        )
        for file in launch.files
    )


def place(launch: VmLaunch) -> Place:
    """Return where things lie as the jailed Firecracker sees them."""
    return Place(directory="/", files=tuple(f"/{one.name}" for one in placed(launch)))


def _check(jailed: Jailed) -> None:
    # The jailer itself asks that the program's name holds the word.
    if "firecracker" not in posixpath.basename(jailed.firecracker):
        raise _refusal("the program's name must hold the word `firecracker`")
    paths = (jailed.jailer, jailed.firecracker, jailed.base, *((jailed.netns,) if jailed.netns else ()))
    for path in paths:
        if not path.startswith("/") or posixpath.normpath(path) != path:
            raise _refusal(f"{path!r} is no plain absolute path")
    parent = jailed.parent_cgroup
    if not parent or parent.startswith(("/", "-")) or posixpath.normpath(parent) != parent or ".." in parent.split("/"):
        raise _refusal(f"{parent!r} is no cgroup below the root")
    for name, value in jailed.cgroups:
        if not _CGROUP.fullmatch(name) or not _VALUE.fullmatch(value):
            raise _refusal(f"{name!r} = {value!r} is no setting of a cgroup")


def _refusal(why: str) -> UnsupportedError:
    return UnsupportedError("firecracker-refused", f"the jailer cannot be told this: {why}")
