"""Making placeholders before a run, sharing them between runs, and removing them afterwards.

A placeholder gives a mount something to stand on where the agent must not create anything. It has
to stay until the last run that uses it has ended: removing a mount point on the host takes the
mount away in every other mount namespace (namespaces(7), Linux 3.18 and later). So one journal per
user (`host/journal.py`) says which run uses which inode. It is written before anything is
made (intent) and again after (fact), so a crash at any step is cleaned up from the file alone.
Not a decision about what to make: that is a `WorkspaceLayout`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

from cloister.errors import RetryError, StepError
from cloister.host import beneath
from cloister.host.journal import Book, Record, Shelf
from cloister.plan.workspace import Node, Placeholder

MAX_CONTENT_BYTES = 4096


class Journal:
    """The placeholders of one user, kept in one `Book` below Cloister's state directory."""

    def __init__(self, state: str) -> None:
        """Keep the journal in the directory `state`, which must be the user's alone."""
        self._shelf = Shelf(state)

    def make(self, run: str, wanted: Sequence[Placeholder]) -> list[str]:
        """Make what is absent and share what another run has made; return the paths this run now uses.

        Raises:
            RetryError: the workspace is not what it was when it was looked at.
            StepError: the file system refused; everything this call made is gone again.
        """
        with self._shelf.open() as book, ExitStack() as stack:
            try:
                self._make(run, wanted, book, stack)
            except (OSError, RetryError) as error:
                _release(book, lambda name: name != run)
                if isinstance(error, RetryError):
                    raise
                message = f"cannot make a placeholder: {error.strerror}"
                raise StepError("workspace-placeholder", message, where=str(error.filename or "")) from error
            return [record.path for record in book.records() if run in record.runs]

    def release(self, run: str) -> list[str]:
        """End the use of a run and remove what nobody uses; return the paths that had to be left."""
        return self.sweep(lambda name: name != run)

    def sweep(self, alive: Callable[[str], bool]) -> list[str]:
        """Drop every run that is not alive and remove what nobody uses; return the paths that had to be left.

        For the start after a crash. A path is left when it is no longer what was made: the person
        has put something there, or has moved the workspace.
        """
        with self._shelf.open() as book:
            return _release(book, alive)

    def records(self) -> list[Record]:
        """Return what the journal says now."""
        with self._shelf.open() as book:
            return book.records()

    def _make(self, run: str, wanted: Sequence[Placeholder], book: Book, stack: ExitStack) -> None:
        shared: list[Record] = []
        missing: list[tuple[int, Record]] = []
        bases: dict[str, int] = {}
        planned: set[str] = set()
        for item in wanted:
            if item.base not in bases:
                bases[item.base] = _open_base(item.base, item.base_node.identity)
                stack.callback(os.close, bases[item.base])
            path = f"{item.base}/{item.name}"
            record = book.find(path)
            above = path.rpartition("/")[0]
            node = Node() if above in planned else beneath.look_below(bases[item.base], item.name)
            if node.kind == "symlink":
                message = "a symbolic link has appeared where the workspace is protected"
                raise RetryError("workspace-changed", message, where=path, remedy="look at it, then start again")
            if record is not None and node.identity == (record.dev, record.ino):
                record.runs.append(run)
                shared.append(record)
            elif node.kind == "absent":
                if record is not None:
                    book.forget(record)
                planned.add(path)
                missing.append((bases[item.base], _intent(run, item)))
        book.write([*shared, *(record for _, record in missing)])
        try:
            for base, record in missing:
                if not _create(base, record):
                    record.runs.clear()
        finally:
            book.write([record for _, record in missing])


def _release(book: Book, alive: Callable[[str], bool]) -> list[str]:
    left: list[str] = []
    changed: list[Record] = []
    with Bases() as bases:
        for record in reversed(book.records()):
            runs = [run for run in dict.fromkeys(record.runs) if alive(run)]
            if runs != record.runs:
                record.runs = runs
                changed.append(record)
            if not runs and not _remove(bases, record):
                left.append(record.path)
    book.write(changed)
    return left


class Bases:
    """Directories opened once for many placeholders; None stands for one that is not there any more."""

    def __init__(self) -> None:
        """Open nothing yet."""
        self._opened: dict[bytes, int | None] = {}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all."""
        for opened in self._opened.values():
            if opened is not None:
                os.close(opened)

    def of(self, record: Record) -> int | None:
        """Return the directory a record counts from, if it is still the same one."""
        if record.base not in self._opened:
            try:
                self._opened[record.base] = beneath.open_root(os.fsdecode(record.base))
            except OSError:
                self._opened[record.base] = None
        opened = self._opened[record.base]
        return opened if opened is not None and os.fstat(opened).st_ino == record.base_ino else None


def _open_base(path: str, identity: tuple[int, int] | None) -> int:
    try:
        opened = beneath.open_root(path)
    except OSError as error:
        raise RetryError("workspace-changed", f"the workspace has gone: {error.strerror}", where=path) from error
    status = os.fstat(opened)
    if identity not in {None, (status.st_dev, status.st_ino)}:
        os.close(opened)
        raise RetryError("workspace-changed", "another directory has taken the workspace's place", where=path)
    return opened


def _intent(run: str, item: Placeholder) -> Record:
    return Record(
        base=os.fsencode(item.base),
        base_dev=item.base_node.dev,
        base_ino=item.base_node.ino,
        name=os.fsencode(item.name),
        kind=item.kind,
        content=item.content.encode() if item.kind == "file" else b"",
        runs=[run],
    )


def _create(base: int, record: Record) -> bool:
    """Make one placeholder and record its inode; False when somebody else has made something there meanwhile."""
    with beneath.parent(base, os.fsdecode(record.name)) as (holder, last):
        try:
            _create_in(holder, last, record)
        except FileExistsError:
            if beneath.look(holder, last).kind == "symlink":
                message = "a symbolic link has appeared where the workspace is protected"
                raise RetryError("workspace-changed", message, where=record.path) from None
            return False
        node = beneath.look(holder, last)
    record.dev, record.ino = node.dev, node.ino
    return True


def _create_in(holder: int, last: str, record: Record) -> None:
    if record.kind == "directory":
        os.mkdir(last, 0o755, dir_fd=holder)
        return
    if record.kind == "socket":
        try:
            os.mknod(last, stat.S_IFSOCK | 0o600, dir_fd=holder)
        except OSError as error:
            # vfat, some FUSE and 9p file systems have no socket inodes; an empty file serves, though git sees it.
            if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:
                raise
            record.kind = "file"
        else:
            return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    opened = os.open(last, flags, 0o644, dir_fd=holder)
    try:
        os.write(opened, record.content)
    finally:
        os.close(opened)


def _remove(bases: Bases, record: Record) -> bool:
    """Remove what the record names if it is still that, untouched; True when nothing of ours is left.

    Devices are not compared: their numbers may change with a reboot, and only what holds nothing is removed.
    """
    base = bases.of(record)
    if base is None:
        return False
    try:
        with beneath.parent(base, os.fsdecode(record.name)) as (holder, last):
            return _remove_in(holder, last, record)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _remove_in(holder: int, last: str, record: Record) -> bool:
    status = os.stat(last, dir_fd=holder, follow_symlinks=False)
    known = record.ino != 0
    if known and status.st_ino != record.ino:
        return True  # ours is gone; this is the person's
    if not known and status.st_uid != os.geteuid():
        return True
    if record.kind == "directory" and stat.S_ISDIR(status.st_mode):
        try:
            os.rmdir(last, dir_fd=holder)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            return False
        return True
    inert = (record.kind == "socket" and stat.S_ISSOCK(status.st_mode)) or (
        record.kind == "file"
        and stat.S_ISREG(status.st_mode)
        and beneath.read_file(holder, last, limit=MAX_CONTENT_BYTES) in _contents(record)
    )
    if inert:
        os.unlink(last, dir_fd=holder)
    return inert or not known


def _contents(record: Record) -> set[bytes]:
    """What an untouched file may hold: its content, or nothing when the crash came between making and writing."""
    return {record.content, b""}
