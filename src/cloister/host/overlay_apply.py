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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal

from cloister.host import beneath
from cloister.host.overlay_review import Review, open_file, stamp
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
            remove_tree(holder, last)
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


def remove_tree(holder: int, name: str) -> None:
    """Remove a directory and what is below it, however deep and whatever its modes, following no link.

    Directories below are moved up before they are emptied, so depth costs neither stack nor descriptors.

    Raises:
        OSError: something could not be removed.
    """
    top = f".cloister-{secrets.token_hex(8)}"
    os.rename(name, top, src_dir_fd=holder, dst_dir_fd=holder)
    with _unlocked(holder, top) as root:
        waiting = _empty(root, root)
        while waiting:
            current = waiting.pop()
            with _unlocked(root, current) as opened:
                waiting += _empty(opened, root)
            os.rmdir(current, dir_fd=root)
    os.rmdir(top, dir_fd=holder)


def _empty(opened: int, root: int) -> list[str]:
    """Unlink every file in a directory and move every directory to `root` under a name of ours; return those names."""
    moved: list[str] = []
    for name in os.listdir(opened):
        if beneath.look(opened, name).kind != "directory":
            os.unlink(name, dir_fd=opened)
            continue
        fresh = f".cloister-{secrets.token_hex(8)}"
        with _unlocked(opened, name):
            os.rename(name, fresh, src_dir_fd=opened, dst_dir_fd=root)
        moved.append(fresh)
    return moved


@contextmanager
def _unlocked(holder: int, name: str) -> Iterator[int]:
    """Open a directory after giving its owner all access; moving a directory needs write access to itself."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=holder)
    try:
        if os.fstat(handle).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(f"/proc/self/fd/{handle}", stat.S_IRWXU)
        opened = beneath.open_directory(handle)
        try:
            yield opened
        finally:
            os.close(opened)
    finally:
        os.close(handle)


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
