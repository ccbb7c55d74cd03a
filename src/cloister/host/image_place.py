"""Where a build works, and as whom: its own user, or, for root, a user that nobody else is.

In the jail a build's programs are root of a user namespace. That is nothing, as long as the user behind it is nothing;
a process that is root outside of it too may write what belongs to root in /proc/sys, whatever is mounted there. So
root's builds run as a user id that exists for them only, below /var/tmp, where that user can get to.

What programs of a build can write is theirs: scripts of packages may leave a link there wherever a file is expected.
So whoever builds writes beside it only (`given`, which they read), and reads what they made as `image_made` does.
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
    """Directories for one build, in one that its programs cannot write."""

    base: str
    uid: int | None = None
    """As whom its programs run; None for whoever builds."""

    @property
    def work(self) -> str:
        """Return the directory that its programs write to."""
        return f"{self.base}/work"

    @property
    def given(self) -> str:
        """Return the directory in which whoever builds leaves files for them; they only read it."""
        return f"{self.base}/given"

    def fresh(self, name: str) -> str:
        """Make another directory for one program alone: nothing that ran before has left anything there.

        Raises:
            OSError: it cannot be made.
        """
        path = f"{self.base}/{name}"
        os.mkdir(path, 0o700)
        if self.uid is not None:
            os.chown(path, self.uid, self.uid)
        return path


@contextlib.contextmanager
def build_place(made: str) -> Iterator[Place]:
    """Furnish the directory `made` for an ordinary user's build; for root's another one, removed in the end.

    What killed builds of root's left is removed first.

    Raises:
        StepError: `image-build`: there is no free user id.
        OSError: it cannot be made.
    """
    before = os.umask(0o022)  # the other user reads what is put there for it; the directory itself is closed
    try:
        if os.getuid() != 0:
            yield _furnished(Place(made))
            return
        _clean()
        uid = _free_uid()
        path = tempfile.mkdtemp(prefix=_PREFIX, dir=_SCRATCH)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.fchown(handle, 0, uid)
            os.fchmod(handle, 0o710)
            yield _furnished(Place(path, uid))
        finally:
            remove_tree(path)  # before the lock goes
            os.close(handle)
    finally:
        os.umask(before)


def _furnished(place: Place) -> Place:
    os.mkdir(place.given, 0o755)
    place.fresh(os.path.basename(place.work))
    return place


def _clean() -> None:
    for name in os.listdir(_SCRATCH):
        path = f"{_SCRATCH}/{name}"
        with contextlib.suppress(FileNotFoundError):
            if name.startswith(_PREFIX) and os.lstat(path).st_uid in {0, *range(_FIRST, _LAST + 1)}:
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
