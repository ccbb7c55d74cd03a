"""Where a build works, and as whom: its own user, or, for root, a user that nobody else is.

In the jail a build's programs are root of a user namespace. That is nothing, as long as the user behind it is nothing;
a process that is root outside of it too may write what belongs to root in /proc/sys, whatever is mounted there. So
root's builds run as a user id that exists for them only, below /var/tmp, where that user can get to.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import secrets
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from cloister.errors import StepError
from cloister.host.image_store import remove_abandoned, remove_tree

_FIRST, _LAST = 61184, 65519
"""Ids that systemd gives to services for a while (DynamicUser=); no account has one."""
_SCRATCH, _PREFIX = "/var/tmp", "cloister-image-"  # noqa: S108  # made by mkdtemp(3)
_TRIES = 64


class Place(NamedTuple):
    """A directory for one build."""

    path: str
    uid: int | None = None
    """As whom its programs run; None for whoever builds."""


@contextlib.contextmanager
def build_place(made: str) -> Iterator[Place]:
    """Give the directory `made` itself to an ordinary user; for root one of another user's, removed in the end.

    What killed builds of root's left is removed first.

    Raises:
        StepError: `image-build`: there is no free user id.
        OSError: it cannot be made.
    """
    before = os.umask(0o022)  # the other user reads what is put there for it; the directory itself is closed
    try:
        if os.getuid() != 0:
            yield Place(made)
            return
        _clean()
        uid = _free_uid()
        path = tempfile.mkdtemp(prefix=_PREFIX, dir=_SCRATCH)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.fchown(handle, uid, uid)
            yield Place(path, uid)
        finally:
            remove_tree(path)  # before the lock goes
            os.close(handle)
    finally:
        os.umask(before)


def _clean() -> None:
    for name in os.listdir(_SCRATCH):
        path = f"{_SCRATCH}/{name}"
        with contextlib.suppress(FileNotFoundError):
            if name.startswith(_PREFIX) and os.lstat(path).st_uid in range(_FIRST, _LAST + 1):
                remove_abandoned(path)


def _free_uid() -> int:
    used = set(_living())
    for _ in range(_TRIES):
        uid = _FIRST + secrets.randbelow(_LAST - _FIRST + 1)
        if uid in used:
            continue
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid
    raise StepError("image-build", "there is no free user id to build as", remedy="build as an ordinary user")


def _living() -> Iterator[int]:
    """Yield the owners of processes."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                yield os.stat(f"/proc/{name}").st_uid
