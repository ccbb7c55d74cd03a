"""Looking from outside at the mounts of a running sandbox: are they what the layout says?

bubblewrap mounts by path, so between the look at a workspace and the mount another process of the
same person could put a link in place. This check, made before the agent gets control, compares
device and inode of every mount with what the host has at that path without following links.
It also tells later whether a mount has gone. It needs a process in the sandbox whose root can
be read (`/proc/PID/root`, proc(5)): the person's own child in a user namespace qualifies.
"""

from __future__ import annotations

import os

from cloister.host import beneath
from cloister.plan.workspace import Mount, Node, WorkspaceLayout

_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def check_mounts(pid: int, made: WorkspaceLayout) -> list[str]:
    """Return one sentence per mount that is not as it should be; an empty list is a pass.

    Raises:
        OSError: the process is gone or may not be looked at.
    """
    outside = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        inside = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            checked = (_check(mount, inside, outside) for mount in made.mounts)
            return [f"{mount.target}: {wrong}" for mount, wrong in zip(made.mounts, checked, strict=True) if wrong]
        finally:
            os.close(inside)
    finally:
        os.close(outside)


def _check(mount: Mount, inside: int, outside: int) -> str:
    try:
        seen, read_only = _look(inside, mount.target)
    except OSError as error:
        return f"not there: {error.strerror}"
    if mount.op not in {"bind", "pin", "overlay"} and not read_only:
        return "writable"
    if mount.op in {"content", "mask"}:
        return ""
    try:
        there, _ = _look(outside, mount.source)
    except OSError as error:
        return f"gone from the host: {error.strerror}"
    expected = mount.node.identity
    if mount.op == "overlay":
        return "" if seen.kind == "directory" and seen.dev != there.dev else "not a copy of what the host has there"
    if seen.identity != there.identity or (mount.op == "bind" and expected not in {None, seen.identity}):
        return "not what the host has there"
    return ""


def _look(base: int, path: str) -> tuple[Node, bool]:
    """Return what is at an absolute path below the root `base`, and whether it is on a read-only mount."""
    with beneath.parent(base, path.lstrip("/")) as (holder, last):
        opened = os.open(last, _LOOK, dir_fd=holder)
    try:
        return beneath.node_of(os.fstat(opened)), bool(os.fstatvfs(opened).f_flag & os.ST_RDONLY)
    finally:
        os.close(opened)
