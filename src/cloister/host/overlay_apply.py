"""Writing a run's reviewed changes into the workspace, and throwing a run's copy away.

The copy was made by an agent and the workspace may change under our hands, so every step goes through
descriptors that never follow a link, every file arrives by rename(2) and is either old or new, and
what is no longer as it was reviewed is refused. What may be applied was said by the review
(`asks`, `never`, `conflict`); this module obeys and looks again.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from cloister.host import beneath
from cloister.host.overlay_review import Review, open_file, stamp
from cloister.host.removal import remove_tree
from cloister.host.sparse import copy_data
from cloister.plan.changes import Change, Stamp
from cloister.plan.workspace import Value

PERMISSIONS = 0o777
"""Set-user-id, set-group-id and sticky never leave the run's copy."""


class Outcome(Value, frozen=True):
    """What became of one change."""

    path: str
    result: Literal["applied", "refused"]
    why: str = ""


class Permission(Value, frozen=True):
    """What the person has allowed besides the ordinary."""

    force: bool = False
    """Overwrite what changed in the workspace since the run began."""
    protected: bool = False
    """Also apply changes that `Change.asks` names."""


class _RefusedError(Exception):
    """This change is not applied; the message says why."""


def apply(review: Review, changes: Sequence[Change], allowed: Permission) -> list[Outcome]:
    """Apply changes one by one, each whole or not at all; deletions come last, deepest first.

    `changes` are some of `review.changes()`. Directories that a chosen path needs are made.
    """
    creating = [change for change in changes if change.op != "deleted"]
    deleting = [change for change in changes if change.op == "deleted"]
    out: list[Outcome] = []
    for change in [*creating, *reversed(deleting)]:
        try:
            _apply(review, change, allowed)
        except _RefusedError as refused:
            out.append(Outcome(change.path, "refused", str(refused)))
        except OSError as error:
            why = "a symbolic link is in the way" if error.errno in {errno.ELOOP, errno.ENOTDIR} else error.strerror
            out.append(Outcome(change.path, "refused", why or "the file system refused"))
        else:
            out.append(Outcome(change.path, "applied"))
    return out


def _apply(review: Review, change: Change, allowed: Permission) -> None:
    if change.never:
        raise _RefusedError(change.never)
    if change.asks and not allowed.protected:
        raise _RefusedError(f"{change.asks}; ask for it with --protected")
    now = stamp(review.lower, change.path)
    if not allowed.force and (change.conflict or not _as_reviewed(now, change.before)):
        raise _RefusedError("it changed in the workspace since the run began; look at it, then use --force")
    if change.op != "deleted":
        _make_parents(review, change.path)
    with beneath.parent(review.lower, change.path) as (holder, last):
        if now.kind == "directory" and change.kind != "directory":
            if not allowed.force and _newest(holder, last) >= review.since_ns:
                raise _RefusedError("something below it changed since the run began; look at it, then use --force")
            _remove_directory(holder, last)
            now = Stamp()
        if change.kind == "absent":
            if now.kind != "absent":
                os.unlink(last, dir_fd=holder)
        elif change.kind == "directory":
            _put_directory(holder, last, change, now)
        else:
            _put(review, change, holder, last)


def discard(run: str, names: Sequence[str] = ("upper", "work")) -> None:
    """Remove a run's copy: the directories `names` below the directory `run`.

    Raises:
        OSError: something could not be removed.
    """
    opened = beneath.open_root(run)
    try:
        for name in names:
            if beneath.look(opened, name).kind == "directory":
                remove_tree(opened, name)
    finally:
        os.close(opened)


def _remove_directory(holder: int, name: str) -> None:
    """Remove a directory of the workspace: it is gone at once, what was in it a little later."""
    top = f".cloister-{secrets.token_hex(8)}"
    os.rename(name, top, src_dir_fd=holder, dst_dir_fd=holder)
    remove_tree(holder, top)


def _as_reviewed(now: Stamp, before: Stamp) -> bool:
    """Whether the workspace still has what was reviewed; a directory's times change with what is applied into it."""
    if now.kind == "directory":
        return before.kind == "directory" and now.ino == before.ino
    return now == before


def _make_parents(review: Review, path: str) -> None:
    parts = path.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        name = "/".join(parts[:depth])
        with beneath.parent(review.lower, name) as (holder, last):
            if beneath.look(holder, last).kind == "absent":
                mode = stamp(review.upper, name).mode
                os.mkdir(last, (mode & PERMISSIONS) | stat.S_IRWXU, dir_fd=holder)


def _put_directory(holder: int, last: str, change: Change, now: Stamp) -> None:
    """Make a directory or set its mode; its owner keeps all access, or nothing could be put into it."""
    if now.kind not in {"absent", "directory"}:
        os.unlink(last, dir_fd=holder)
    if now.kind != "directory":
        os.mkdir(last, stat.S_IRWXU, dir_fd=holder)
    with beneath.directory(holder, last) as opened:
        os.fchmod(opened, (change.mode & PERMISSIONS) | stat.S_IRWXU)


def _put(review: Review, change: Change, holder: int, last: str) -> None:
    """Make a file or link beside its place and rename it there."""
    fresh = f".cloister-{secrets.token_hex(8)}"
    try:
        if change.kind == "symlink":
            os.symlink(change.link, fresh, dir_fd=holder)
        else:
            _copy(review, change, holder, fresh)
        if beneath.look(holder, last).kind == "absent":
            _link_new(holder, fresh, last)
        else:
            os.rename(fresh, last, src_dir_fd=holder, dst_dir_fd=holder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=holder)


def _link_new(holder: int, fresh: str, last: str) -> None:
    """Give a new file its name without replacing one that appears meanwhile."""
    try:
        os.link(fresh, last, src_dir_fd=holder, dst_dir_fd=holder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP}:
            raise
        os.rename(fresh, last, src_dir_fd=holder, dst_dir_fd=holder)  # vfat and others have no links


def _copy(review: Review, change: Change, holder: int, fresh: str) -> None:
    """Copy a file's data, its holes and the time of its last change, by which make(1) and its like decide."""
    source = open_file(review.upper, change.path)
    try:
        status = os.fstat(source)
        if status.st_size != change.size:
            raise _RefusedError("the run's copy is not what was reviewed")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(fresh, flags, 0o600, dir_fd=holder)
        try:
            if not copy_data(source, target, change.size):
                raise _RefusedError("the run's copy is not what was reviewed")
            os.fchmod(target, change.mode & PERMISSIONS)
            with suppress(OSError, OverflowError):  # a time that this file system cannot keep
                os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(target)
    finally:
        os.close(source)


def _newest(holder: int, name: str) -> int:
    """Return the latest change time below a directory; what cannot be read counts as changed now."""
    newest = 0
    queue = [name]
    while queue:
        place = queue.pop()
        try:
            with beneath.directory(holder, place) as opened:
                for child in os.listdir(opened):
                    status = os.stat(child, dir_fd=opened, follow_symlinks=False)
                    newest = max(newest, status.st_ctime_ns)
                    if stat.S_ISDIR(status.st_mode):
                        queue.append(f"{place}/{child}")
        except OSError:
            return sys.maxsize
    return newest
