"""Opening and looking at paths without ever following a symbolic link.

Every component is opened relative to its parent with `O_NOFOLLOW` (open(2)), so a link swapped
in between two looks gives ELOOP or ENOTDIR, never another place. This is what
openat2(2) does with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, and it also works on kernels and in
containers that refuse that call. Not a policy: callers decide what a refusal means.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from cloister.plan.workspace import ABSENT, Node

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
THROUGH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""A directory that only leads to others: it cannot be listed."""
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def split(name: str) -> list[str]:
    """Return the components of a relative path.

    Raises:
        OSError: EINVAL for `..`, NUL, an absolute or an empty path; those could leave the base.
    """
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise OSError(errno.EINVAL, "not a path below its base", name)
    return parts


def open_directory(base: int, name: str = "", *, flags: int = _DIRECTORY) -> int:
    """Open the directory `name` below the directory `base`; an empty name opens `base` again."""
    parts = split(name) if name else ["."]
    current = base
    try:
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            opened = os.open(part, flags if last else THROUGH, dir_fd=current)
            if current != base:
                os.close(current)
            current = opened
    except OSError:
        if current != base:
            os.close(current)
        raise
    return current


def open_root(path: str, *, flags: int = _DIRECTORY) -> int:
    """Open an absolute directory path that has no symbolic link in any component.

    Raises:
        OSError: ELOOP or ENOTDIR when a component is a link or no directory, ENOENT, EACCES.
    """
    base = os.open("/", THROUGH)
    try:
        return open_directory(base, path.lstrip("/"), flags=flags)
    finally:
        os.close(base)


@contextmanager
def directory(base: int, name: str = "") -> Iterator[int]:
    """Open a directory below `base` for the time of a `with` block."""
    opened = open_directory(base, name)
    try:
        yield opened
    finally:
        os.close(opened)


@contextmanager
def parent(base: int, name: str) -> Iterator[tuple[int, str]]:
    """Open the directory that holds `name` and give its descriptor and the last component."""
    parts = split(name)
    if len(parts) == 1:
        yield base, parts[0]
        return
    opened = open_directory(base, "/".join(parts[:-1]), flags=THROUGH)
    try:
        yield opened, parts[-1]
    finally:
        os.close(opened)


def node_of(status: os.stat_result) -> Node:
    """Return what a stat result says as a `Node`."""
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return Node("file", status.st_dev, status.st_ino)
    if stat.S_ISDIR(mode):
        return Node("directory", status.st_dev, status.st_ino)
    return Node("symlink" if stat.S_ISLNK(mode) else "other", status.st_dev, status.st_ino)


def look(base: int, name: str) -> Node:
    """Return what one component `name` of the directory `base` is; `ABSENT` if nothing.

    Raises:
        OSError: anything but ENOENT: what cannot be looked at must not pass for absent.
    """
    try:
        return node_of(os.stat(name, dir_fd=base, follow_symlinks=False))
    except FileNotFoundError:
        return ABSENT


def look_below(base: int, name: str) -> Node:
    """Return what the relative path `name` below the directory `base` is; `ABSENT` if its last component is.

    Raises:
        OSError: EINVAL for a path that could leave the base; ENOENT and others for what is above the last component.
    """
    if "/" not in name and "\0" not in name and name not in {"", ".", ".."}:  # most are: no path to walk
        return look(base, name)
    with parent(base, name) as (holder, last):
        return look(holder, last)


def read_file(base: int, name: str, *, limit: int) -> bytes | None:
    """Return the content of a regular file below `base`, or None if there is none or it is longer than `limit` bytes.

    A FIFO or device is never waited for and a link never followed.
    """
    try:
        with parent(base, name) as (holder, last):
            opened = os.open(last, FILE_FLAGS, dir_fd=holder)
    except OSError:
        return None
    try:
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            return None
        data = os.read(opened, limit + 1)
    except OSError:
        return None
    finally:
        os.close(opened)
    return data if len(data) <= limit else None
