"""What a run in overlay mode changed: the upper directory of its overlay, read from outside against the workspace.

The kernel's overlay format (Documentation/filesystems/overlayfs.rst, mounted with `userxattr`): a
deleted name is a character device 0:0 or a file with `user.overlay.whiteout`, a directory that hides
the one below carries `user.overlay.opaque`. Everything here was written by an agent: links are never
followed, special files never opened, and the numbers are bounded. It only reads; see `overlay_apply`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from cloister.errors import DeniedError, UnsupportedError
from cloister.host import beneath
from cloister.host.tripwires import MAX_INDEX_BYTES, hash_bytes
from cloister.plan.changes import LEADS_OUT, Change, Stamp, asks, at_system_program
from cloister.plan.gitindex import forged_paths
from cloister.plan.textdiff import MAX_BYTES, printable, unified
from cloister.plan.workspace import NodeKind

MAX_CHANGES = 100_000
MAX_DEPTH = 64
"""Directories deeper than this are named, not read: every step down costs one open."""
CHUNK = 1 << 20
TICK_NS = 20_000_000
"""File systems stamp with the last clock tick; see tripwires."""


def stamp(base: int, name: str) -> Stamp:
    """Return how `base/name` looks now; a link in the way counts as absent."""
    try:
        with beneath.parent(base, name) as (holder, last):
            return stamp_of(os.stat(last, dir_fd=holder, follow_symlinks=False))
    except OSError:
        return Stamp()


def stamp_of(status: os.stat_result) -> Stamp:
    """Return a stat result as a `Stamp`."""
    return Stamp(
        kind=beneath.node_of(status).kind,
        mode=stat.S_IMODE(status.st_mode),
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        ino=status.st_ino,
    )


@contextmanager
def open_review(lower: str, upper: str, *, names: Iterable[str], since_ns: int) -> Iterator[Review]:
    """Open the workspace `lower` and a run's upper directory for the time of a `with` block; see `Review`.

    The agent owns the upper directory's mode and may have closed it; it is opened again for its owner.

    Raises:
        DeniedError: one of them is gone or is a symbolic link.
    """
    with ExitStack() as stack:
        opened: list[int] = []
        for path in (lower, upper):
            try:
                opened.append(_open_unlocked(path))
            except OSError as error:
                message = f"cannot open the changes of the run: {error.strerror}"
                raise DeniedError("overlay-unreadable", message, where=path) from error
            stack.callback(os.close, opened[-1])
        yield Review(opened[0], opened[1], names=names, since_ns=since_ns)


def _open_unlocked(path: str) -> int:
    try:
        return beneath.open_root(path)
    except PermissionError:
        holder = beneath.open_root(path.rpartition("/")[0])
        with _closing(holder):
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(path.rpartition("/")[2], flags, dir_fd=holder)
        with _closing(handle):
            os.chmod(f"/proc/self/fd/{handle}", stat.S_IRWXU)
        return beneath.open_root(path)


class Review:
    """A run's changes against its workspace. Both directories stay open for as long as it is in use."""

    def __init__(self, lower: int, upper: int, *, names: Iterable[str], since_ns: int) -> None:
        """Compare two open directories.

        Args:
            lower: the workspace.
            upper: the overlay's upper directory, no longer mounted.
            names: protected names.
            since_ns: when the run began; what changed in the workspace later is a conflict.
        """
        self.lower = lower
        self.upper = upper
        self._names = tuple(names)
        self.since_ns = since_ns - TICK_NS

    def changes(self) -> list[Change]:
        """Return every change, parents before children.

        Raises:
            UnsupportedError: there are more than `MAX_CHANGES`.
        """
        out: list[Change] = []
        queue: deque[tuple[str, bool]] = deque([("", False)])
        while queue:
            place, hidden = queue.popleft()
            if place.count("/") >= MAX_DEPTH:
                out.append(Change(place, "added", "directory", Stamp(), never="it is too deep"))
                continue
            out.extend(self._directory(place, hidden, queue))
            if len(out) > MAX_CHANGES:
                remedy = "look at the run's upper directory by hand, or discard the run"
                raise UnsupportedError(
                    "overlay-too-large", f"the run changed more than {MAX_CHANGES} paths", remedy=remedy
                )
        return sorted(out, key=lambda change: change.path.split("/"))

    def diff(self, change: Change) -> str:
        """Return the difference for people: text for files, one line for everything else."""
        shown = printable(change.path)
        if change.kind == "symlink":
            return f"{shown}: symbolic link to {printable(change.link)} ({change.op})\n"
        if change.kind in {"directory", "other"} or change.before.kind in {"directory", "other", "symlink"}:
            return f"{shown}: {change.kind if change.kind != 'absent' else change.before.kind} ({change.op})\n"
        old = _content(self.lower, change.path) if change.before.kind == "file" else None
        new = _content(self.upper, change.path) if change.kind == "file" else None
        modes = ""
        if change.op == "modified" and change.mode != change.before.mode:
            modes = f"{shown}: mode {change.before.mode:04o} to {change.mode:04o}\n"
        return modes + unified(change.path, old, new)

    def _directory(self, place: str, hidden: bool, queue: deque[tuple[str, bool]]) -> Iterator[Change]:
        """Compare one directory of the upper side; `hidden` when nothing of the lower shows through it."""
        try:
            opened = beneath.open_directory(self.upper, place)
        except OSError as error:
            yield Change(
                place, "modified", "directory", stamp(self.lower, place), never=f"unreadable: {error.strerror}"
            )
            return
        with _closing(opened), os.scandir(opened) as entries:
            hidden = hidden or _attribute(opened, "user.overlay.opaque") in {b"y", b"x"}
            seen: set[str] = set()
            for entry in entries:
                seen.add(entry.name)
                path = f"{place}/{entry.name}" if place else entry.name
                yield from self._entry(opened, entry.name, path, hidden, queue)
        if hidden:
            yield from self._hidden(place, seen)

    def _hidden(self, place: str, seen: set[str]) -> Iterator[Change]:
        """Yield what an opaque directory hides: everything of the workspace's that the run did not make anew."""
        try:
            opened = beneath.open_directory(self.lower, place)
        except OSError:
            return
        with _closing(opened):
            for name in sorted(set(os.listdir(opened)) - seen):
                path = f"{place}/{name}" if place else name
                yield self._change(path, stamp(self.lower, path))

    def _entry(
        self, opened: int, name: str, path: str, hidden: bool, queue: deque[tuple[str, bool]]
    ) -> Iterator[Change]:
        status = os.stat(name, dir_fd=opened, follow_symlinks=False)
        before = stamp(self.lower, path)
        if _whiteout(opened, name, status):
            if before.kind != "absent":
                yield self._change(path, before)
            return
        now = stamp_of(status)
        link = os.readlink(name, dir_fd=opened) if now.kind == "symlink" else ""
        differs = before.kind != now.kind or (now.mode != before.mode and now.kind != "symlink")
        if differs or (now.kind != "directory" and not self._same(path, now, link)):
            yield self._change(path, before, now, link)
        if now.kind == "directory":
            queue.append((path, hidden or before.kind != "directory"))

    def _same(self, path: str, now: Stamp, link: str) -> bool:
        """Whether both sides hold the same content; opening a file for writing copies it up unchanged."""
        try:
            if now.kind == "symlink":
                with beneath.parent(self.lower, path) as (holder, last):
                    return os.readlink(last, dir_fd=holder) == link
            return now.kind == "file" and _same_content(self.lower, self.upper, path)
        except OSError:
            return False

    def _change(self, path: str, before: Stamp, now: Stamp | None = None, link: str = "") -> Change:
        """Put together what is known of one path; `now` is None where the run deleted it."""
        kind = now.kind if now else "absent"
        if now is None:
            op: Literal["added", "modified", "deleted", "replaced"] = "deleted"
        elif before.kind == "absent":
            op = "added"
        else:
            op = "modified" if before.kind == kind else "replaced"
        touched = before.kind != "absent" and before.ctime_ns >= self.since_ns
        special = kind == "other" or (before.kind == "other" and kind != "absent")
        return Change(
            path=path,
            op=op,
            kind=kind,
            before=before,
            mode=now.mode if now else 0,
            size=now.size if now else 0,
            link=link,
            # A directory's own stamp changes with every name in it, so it counts only where it goes away.
            conflict=touched and not (before.kind == "directory" and op == "modified"),
            asks=self._asks(path, kind, link) or (self._forged(path) if kind == "file" else ""),
            never="devices, FIFOs and sockets are not applied" if special else "",
        )

    def _asks(self, path: str, kind: NodeKind, link: str) -> str:
        """Say why a change waits to be asked for. Through a link to what only root writes, nobody here writes."""
        why = asks(path, kind, link, self._names)
        if why != LEADS_OUT or not at_system_program(link):
            return why
        return why if os.access(link, os.W_OK) or os.access(os.path.dirname(link), os.W_OK) else ""

    def _forged(self, path: str) -> str:
        """Say what is wrong with the run's git index, through which `git checkout` would write anywhere."""
        if path != ".git/index":
            return ""
        size = hash_bytes(self.lower, ".git/config")
        data = beneath.read_file(self.upper, path, limit=MAX_INDEX_BYTES)
        return "a forged git index" if data is None or forged_paths(data, hash_bytes=size) else ""


@contextmanager
def _closing(opened: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(opened)


def _whiteout(opened: int, name: str, status: os.stat_result) -> bool:
    if stat.S_ISCHR(status.st_mode):
        return status.st_rdev == 0
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        return False
    try:
        file = os.open(name, beneath.FILE_FLAGS, dir_fd=opened)
    except OSError:
        return False
    with _closing(file):
        return _attribute(file, "user.overlay.whiteout") is not None


def _attribute(opened: int, name: str) -> bytes | None:
    try:
        return os.getxattr(opened, name)
    except OSError:
        return None


def open_file(base: int, name: str) -> int:
    """Open a regular file below `base` for reading, waiting for nothing and following nothing.

    Raises:
        OSError: it is not there, not readable, or no regular file.
    """
    with beneath.parent(base, name) as (holder, last):
        opened = os.open(last, beneath.FILE_FLAGS, dir_fd=holder)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "not a regular file", name)
    return opened


def _same_content(one: int, other: int, name: str) -> bool:
    first = open_file(one, name)
    with _closing(first):
        second = open_file(other, name)
        with _closing(second):
            if os.fstat(first).st_size != os.fstat(second).st_size:
                return False
            while chunk := os.read(first, CHUNK):
                if os.read(second, len(chunk)) != chunk:
                    return False
            return not os.read(second, 1)


def _content(base: int, name: str) -> bytes:
    """Return a file's first bytes, one more than is ever shown; what cannot be read shows as empty."""
    try:
        opened = open_file(base, name)
    except OSError:
        return b""
    with _closing(opened):
        return os.read(opened, MAX_BYTES + 1)
