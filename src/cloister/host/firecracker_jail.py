"""Building and clearing the chroot that Firecracker's jailer enters; for root only.

Files come by descriptor, so what was verified is what lies there: linked where the monitor works on the file itself,
copied where it is read once. Nothing that the jail's user could write is followed: the directories are root's until
the jailer gives the chroot away.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from cloister.errors import StepError
from cloister.host import removal

_PIECE = 1 << 30


class Placed(Protocol):
    """One file of the plan (`isolation/firecracker_jailer.py`)."""

    @property
    def name(self) -> str:
        """In the chroot's root directory."""
        ...

    @property
    def how(self) -> str:
        """`link` or `copy`."""
        ...

    @property
    def write(self) -> bool:
        """Whether it belongs to the jail's user."""
        ...


def build(root: str, files: Sequence[tuple[Placed, int]], *, uid: int, gid: int) -> None:
    """Make the chroot and everything in it, or nothing.

    Args:
        root: the directory that will be `/` in the jail; it must not be there yet.
        files: what lies in it, each with an open descriptor of it.
        uid: of the jail's user, who gets the writable disks.
        gid: of the jail's group, who may read the rest.

    Raises:
        StepError: it is there already, or the file system refuses.
    """
    try:
        os.makedirs(os.path.dirname(root), 0o700, exist_ok=True)
        os.mkdir(root, 0o700)
    except OSError as error:
        raise _failed(root, error) from None
    try:
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for file, descriptor in files:
                _put(directory, file, descriptor, uid, gid)
        finally:
            os.close(directory)
    except OSError as error:
        clear(root)
        raise _failed(root, error) from None


def clear(root: str) -> None:
    """Take the chroot away, with its own directory above it; whatever lies in it was the jail's.

    Raises:
        StepError: something of it stays.
    """
    above = os.path.dirname(root)
    try:
        removal.remove(above)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _failed(above, error) from None


def _put(directory: int, file: Placed, descriptor: int, uid: int, gid: int) -> None:
    if file.how == "link":
        # linkat(2) with AT_SYMLINK_FOLLOW: the file that is open, whatever its path leads to by now.
        os.link(f"/proc/self/fd/{descriptor}", file.name, dst_dir_fd=directory, follow_symlinks=True)
        if file.write:
            os.fchown(descriptor, uid, gid)
        elif not _readable(descriptor, gid):
            os.unlink(file.name, dir_fd=directory)
            _copy(directory, file.name, descriptor, gid)
        return
    _copy(directory, file.name, descriptor, gid)


def _readable(descriptor: int, gid: int) -> bool:
    """Return whether the jail's group may read a file that stays as it is, and nobody in the jail may write it."""
    status = os.fstat(descriptor)
    reads = status.st_mode & (0o040 if status.st_gid == gid else 0o004)
    return bool(reads) and not status.st_mode & 0o022 and status.st_uid == 0


def _copy(directory: int, name: str, descriptor: int, gid: int) -> None:
    """Copy a file that is only read: root's, readable by the jail's group."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    target = os.open(name, flags, 0o440, dir_fd=directory)
    try:
        at = 0
        while done := os.sendfile(target, descriptor, at, _PIECE):
            at += done
        os.fchown(target, 0, gid)
        os.fchmod(target, 0o440)
    finally:
        os.close(target)


def _failed(path: str, error: OSError) -> StepError:
    return StepError("firecracker-jail", f"the jail's directory: {error.strerror}", where=path)
