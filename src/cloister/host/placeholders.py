"""Making placeholders before a run, sharing them between runs, and removing them afterwards.

A placeholder gives a mount something to stand on where the agent must not create anything. It has
to stay until the last run that uses it has ended: removing a mount point on the host takes the
mount away in every other mount namespace (namespaces(7), Linux 3.18 and later). So one journal per
user, guarded by flock(2), says which run uses which inode. It is written before anything is
made (intent) and again after (fact), so a crash at any step is cleaned up from the file alone.
Not a decision about what to make: that is a `WorkspaceLayout`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from cloister.errors import RetryError, StepError
from cloister.host import beneath
from cloister.plan.workspace import Node, Placeholder

MAX_CONTENT_BYTES = 4096
MAX_JOURNAL_BYTES = 1 << 20
"""Past this the states that are no longer needed are dropped."""


class Record(msgspec.Struct):
    """One placeholder in the journal. Paths are bytes: a name need not be text."""

    base: bytes
    base_dev: int
    base_ino: int
    name: bytes
    kind: str
    content: bytes
    runs: list[str]
    dev: int = 0
    ino: int = 0
    """0 while it is only intended."""

    @property
    def path(self) -> str:
        """Return the absolute path, for people and for comparison."""
        return f"{os.fsdecode(self.base)}/{os.fsdecode(self.name)}"


class Journal:
    """The placeholders of one user, in one file below Cloister's state directory."""

    def __init__(self, state: str) -> None:
        """Keep the journal in the directory `state`, which must be the user's alone."""
        self._state = Path(state)
        self._file = self._state / "placeholders.jsonl"
        self._lock = self._state / "placeholders.lock"
        self._opened = -1

    def make(self, run: str, wanted: Sequence[Placeholder]) -> list[str]:
        """Make what is absent and share what another run has made; return the paths this run now uses.

        Raises:
            RetryError: the workspace is not what it was when it was looked at.
            StepError: the file system refused; everything this call made is gone again.
        """
        with self._locked() as records, ExitStack() as stack:
            try:
                self._make(run, wanted, records, stack)
            except (OSError, RetryError) as error:
                self._release(records, lambda name: name != run)
                if isinstance(error, RetryError):
                    raise
                message = f"cannot make a placeholder: {error.strerror}"
                raise StepError("workspace-placeholder", message, where=str(error.filename or "")) from error
            return [record.path for record in records if run in record.runs]

    def release(self, run: str) -> list[str]:
        """End the use of a run and remove what nobody uses; return the paths that had to be left."""
        return self.sweep(lambda name: name != run)

    def sweep(self, alive: Callable[[str], bool]) -> list[str]:
        """Drop every run that is not alive and remove what nobody uses; return the paths that had to be left.

        For the start after a crash. A path is left when it is no longer what was made: the person
        has put something there, or has moved the workspace.
        """
        with self._locked() as records:
            return self._release(records, alive)

    def records(self) -> list[Record]:
        """Return what the journal says now."""
        with self._locked() as records:
            return list(records)

    def _make(self, run: str, wanted: Sequence[Placeholder], records: list[Record], stack: ExitStack) -> None:
        known = {record.path: record for record in records}
        missing: list[tuple[int, Record]] = []
        bases: dict[str, int] = {}
        planned: set[str] = set()
        for item in wanted:
            if item.base not in bases:
                bases[item.base] = _open_base(item.base, item.base_node.identity)
                stack.callback(os.close, bases[item.base])
            path = f"{item.base}/{item.name}"
            record = known.get(path)
            node = Node() if path.rpartition("/")[0] in planned else _look(bases[item.base], item.name)
            if node.kind == "symlink":
                message = "a symbolic link has appeared where the workspace is protected"
                raise RetryError("workspace-changed", message, where=path, remedy="look at it, then start again")
            if record is not None and node.identity == (record.dev, record.ino):
                record.runs.append(run)
            elif node.kind == "absent":
                if record is not None:
                    records.remove(record)
                planned.add(path)
                missing.append((bases[item.base], _intent(run, item)))
        if not missing:
            return
        records.extend(record for _, record in missing)
        self._write(records)
        for base, record in missing:
            if not _create(base, record):
                records.remove(record)

    def _release(self, records: list[Record], alive: Callable[[str], bool]) -> list[str]:
        left: list[str] = []
        kept: list[Record] = []
        with ExitStack() as stack:
            bases: dict[tuple[bytes, int], int] = {}
            for record in reversed(records):
                record.runs = [run for run in dict.fromkeys(record.runs) if alive(run)]
                if record.runs:
                    kept.append(record)
                    continue
                key = record.base, record.base_ino
                if key not in bases:
                    bases[key] = _reopen_base(record, stack)
                if not _remove(bases[key], record):
                    left.append(record.path)
        records[:] = reversed(kept)
        return left

    @contextmanager
    def _locked(self) -> Iterator[list[Record]]:
        """Hold the lock, give the records, and write them back if they changed."""
        with ExitStack() as stack:
            lock = self._open(self._lock, stack)
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._opened = self._open(self._file, stack)
            records, text = self._read()
            try:
                yield records
            finally:
                if msgspec.json.encode(records) != text:
                    self._write(records)

    def _open(self, path: Path, stack: ExitStack) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
            opened = os.open(path, flags, 0o600)
        except OSError as error:
            message = f"the journal of placeholders cannot be opened: {error.strerror}"
            remedy = f"make it yours again: chown -R $(id -u) {self._state}"
            raise StepError("placeholder-journal", message, where=str(path), remedy=remedy) from error
        stack.callback(os.close, opened)
        return opened

    def _read(self) -> tuple[list[Record], bytes]:
        """Return the newest state. A line without its end was cut off by a crash before anything relied on it."""
        size = os.fstat(self._opened).st_size
        whole = os.pread(self._opened, size, 0)
        lines = whole.split(b"\n")
        if lines[-1]:
            os.ftruncate(self._opened, size - len(lines[-1]))
        text = lines[-2] if len(lines) > 1 else b"[]"
        try:
            return msgspec.json.decode(text, type=list[Record]), text
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            remedy = f"stop all runs, remove the empty files it names from your projects, then: rm {self._file}"
            message = f"the journal of placeholders cannot be read: {error}"
            raise StepError("placeholder-journal", message, where=str(self._file), remedy=remedy) from error

    def _write(self, records: list[Record]) -> None:
        """Append a state, or start again when there is nothing to keep.

        Appending because ext4 writes a file out to disk when another is renamed over it (auto_da_alloc, ext4(5)).
        """
        line = msgspec.json.encode(records) + b"\n"
        if not records:
            os.ftruncate(self._opened, 0)
        elif os.fstat(self._opened).st_size < MAX_JOURNAL_BYTES:
            os.write(self._opened, line)
        else:
            # The open descriptor keeps the old, long file, so a second state under the same lock comes here too.
            fresh = self._file.with_suffix(".new")
            fresh.write_bytes(line)
            fresh.replace(self._file)


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


def _look(base: int, name: str) -> Node:
    with beneath.parent(base, name) as (holder, last):
        return beneath.look(holder, last)


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
    if record.content and _create_whole(holder, last, record.content):
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    opened = os.open(last, flags, 0o644, dir_fd=holder)
    try:
        os.write(opened, record.content)
    finally:
        os.close(opened)


def _create_whole(holder: int, last: str, content: bytes) -> bool:
    """Make a file that is never seen empty, since git on the host dies of an empty `commondir`; see open(2), O_TMPFILE.

    Returns False where the file system has no unnamed files.
    """
    try:
        opened = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=holder)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}:
            raise
        return False
    try:
        os.write(opened, content)
        os.link(f"/proc/self/fd/{opened}", last, dst_dir_fd=holder, follow_symlinks=True)
    finally:
        os.close(opened)
    return True


def _reopen_base(record: Record, stack: ExitStack) -> int:
    """Open the record's base again, until the stack unwinds; -1 if it is gone or another directory.

    Devices are not compared, here and below: their numbers may change with a reboot, and only what
    holds nothing is removed.
    """
    try:
        base = beneath.open_root(os.fsdecode(record.base))
    except OSError:
        return -1
    stack.callback(os.close, base)
    return base if os.fstat(base).st_ino == record.base_ino else -1


def _remove(base: int, record: Record) -> bool:
    """Remove what the record names if it is still that, untouched; True when nothing of ours is left."""
    if base < 0:
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
