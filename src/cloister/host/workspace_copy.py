"""A copy of a workspace in a run's directory for changes, where its file system cannot carry an overlay for an account.

It has the form of an overlay's upper directory that hides everything below it (`user.overlay.opaque`), so that what the
agent deletes is found by the same review (`overlay_review`). Made with the user's own rights from descriptors, no
link is followed; what is neither file, directory nor link is left out, as a review would not apply it either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from cloister.errors import UnsupportedError
from cloister.host import beneath
from cloister.host.sparse import copy_data

MAX_ENTRIES = 200_000
SPARE_BYTES = 256 << 20
"""What must stay free on the file system of the copy."""
_MAX_DEPTH = 64
_PERMISSIONS = 0o777
_ATTRIBUTE = "user.overlay.opaque"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_workspace(root: str, upper: str) -> None:
    """Copy the directory `root` into the empty directory `upper`, which is marked when all is there.

    Raises:
        UnsupportedError: it is too large, or cannot be read or written.
    """
    try:
        source, target = beneath.open_root(root), beneath.open_root(upper)
        try:
            _Copier(root).directory(source, target, 0)
            os.fchmod(target, stat.S_IRWXU)
            os.setxattr(target, _ATTRIBUTE, b"y")
        finally:
            os.close(source)
            os.close(target)
    except OSError as error:
        shown = f": {error.filename}" if error.filename else ""
        raise _refused(f"it cannot be copied: {error.strerror}{shown}", root) from error


def _refused(why: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        "workspace-copy", f"the workspace's file system has no idmapped mounts, and {why}", where=where,
        remedy="a workspace on ext4, xfs or btrfs; or a group that you share: [agents.X.unit] "
        'ownership = "group", with workspace.mode = "direct"',
    )  # fmt: skip


class _Copier:
    """One copy under way."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._entries = 0

    def directory(self, source: int, target: int, depth: int) -> None:
        for name in sorted(os.listdir(source)):
            self._entries += 1
            if self._entries > MAX_ENTRIES or depth >= _MAX_DEPTH:
                raise _refused(f"it has more than {MAX_ENTRIES} entries, or {_MAX_DEPTH} levels", self._root)
            with contextlib.suppress(FileNotFoundError):  # it may go while it is looked at
                self._entry(source, target, name, depth)

    def _entry(self, source: int, target: int, name: str, depth: int) -> None:
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif stat.S_ISDIR(status.st_mode):
            os.mkdir(name, stat.S_IRWXU, dir_fd=target)
            with beneath.directory(source, name) as below, beneath.directory(target, name) as made:
                self.directory(below, made, depth + 1)
                _finish(made, status)
        elif stat.S_ISREG(status.st_mode):
            _file(source, target, name)


def _file(source: int, target: int, name: str) -> None:
    opened = os.open(name, beneath.FILE_FLAGS, dir_fd=source)
    try:
        made = os.open(name, _NEW, 0o600, dir_fd=target)
        try:
            status, free = os.fstat(opened), os.fstatvfs(made)
            if status.st_blocks * 512 + SPARE_BYTES > free.f_bavail * free.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            copy_data(opened, made, status.st_size)
            _finish(made, status)
        finally:
            os.close(made)
    finally:
        os.close(opened)


def _finish(made: int, status: os.stat_result) -> None:
    os.fchmod(made, stat.S_IMODE(status.st_mode) & _PERMISSIONS)
    os.utime(made, ns=(status.st_atime_ns, status.st_mtime_ns))
