"""What a descriptor names that can be watched: a cgroup, or a pid namespace; and whether it still lives.

Who asks for a watch hands over a descriptor, never a path or a pid: it holds what it names while it is looked at. A pid
namespace may be watched by whoever owns its user namespace (ioctl_ns(2)); a cgroup by root only.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from typing import NamedTuple

from cloister.errors import StepError

NAMESPACE_KEY = 1 << 63
CGROUP_TREES = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
_INITIAL_CGROUPS = 0xEFFFFFFB  # PROC_CGROUP_INIT_INO, include/linux/proc_ns.h
_NS_GET_USERNS, _NS_GET_NSTYPE, _NS_GET_OWNER_UID = 0xB701, 0xB703, 0xB704
_CLONE_NEWPID = 0x20000000
_CGROUP2_MAGIC = "cgroup2"


class Watched(NamedTuple):
    """Something that can be watched."""

    key: int
    """What the kernel's side looks it up by."""
    level: int
    """The depth of a cgroup below the root; 0 for a pid namespace, and where it cannot be known."""
    owner: int
    """Who may watch it besides root."""


def of_descriptor(descriptor: int) -> Watched:
    """Return what a descriptor names.

    Raises:
        StepError: neither a directory of cgroup v2 nor a pid namespace of somebody's.
    """
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return _cgroup(descriptor)
        return _namespace(descriptor)
    except OSError as error:
        message = f"this can be watched by nobody: {error.strerror}"
        raise StepError("kernel-watch-refused", message) from error


def cgroup_tree() -> str:
    """Return where cgroup v2 is mounted, or nothing."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        mounts = [line.partition(" - ")[::2] for line in file]
    found = [left.split()[4] for left, right in mounts if right.startswith(f"{_CGROUP2_MAGIC} ")]
    return next((path for path in CGROUP_TREES if path in found), found[0] if found else "")


def lives(descriptor: int) -> bool:
    """Whether the cgroup still is there; a namespace is over when nobody but us holds it, which only its end tells."""
    try:
        os.stat("cgroup.procs", dir_fd=descriptor)
    except OSError:
        return False
    return True


def _cgroup(descriptor: int) -> Watched:
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    tree = cgroup_tree()
    inside = tree and path.startswith(f"{tree}/") and os.fstat(descriptor).st_dev == os.stat(tree).st_dev
    if not inside or not lives(descriptor):
        raise StepError("kernel-watch-refused", "this is no cgroup below the root")
    # In a cgroup namespace the root that we see is somewhere in the tree, and nobody tells how deep.
    level = path[len(tree) :].count("/") if os.stat("/proc/self/ns/cgroup").st_ino == _INITIAL_CGROUPS else 0
    return Watched(os.fstat(descriptor).st_ino, level, 0)


def _namespace(descriptor: int) -> Watched:
    if fcntl.ioctl(descriptor, _NS_GET_NSTYPE) != _CLONE_NEWPID:
        raise StepError("kernel-watch-refused", "this is no pid namespace")
    number = os.fstat(descriptor).st_ino
    if number == os.stat("/proc/self/ns/pid").st_ino:
        raise StepError("kernel-watch-refused", "this is the pid namespace of the whole system")
    users = fcntl.ioctl(descriptor, _NS_GET_USERNS)
    try:
        owner = struct.unpack("I", fcntl.ioctl(users, _NS_GET_OWNER_UID, b"\0" * 4))[0]
    finally:
        os.close(users)
    return Watched(NAMESPACE_KEY | number, 0, owner)
