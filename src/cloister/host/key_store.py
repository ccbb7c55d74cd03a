"""The files of the key store: one document, one lock, and the master key where it is ours to keep.

    identity/            0700
      store.json         the document, replaced by rename, never edited
      lock               held while it is read and written: one writer, whichever process
      master.key         64 hexadecimal digits, 0600; only where the master key was generated
      master.key.next    exists while the master key changes; see `finish_change`

Bytes and names only: what a document means and how it is sealed is for `identity/`. Everything
is opened without following links and refused when others could read or write it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator

from cloister.errors import DeniedError, RetryError, StepError

DOCUMENT = "store.json"
MASTER = "master.key"
_MAX_BYTES = 64 << 20
_MAX_KEY_BYTES = 4096
_LOCK_WAIT_S = 10.0
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class KeyFiles:
    """The directory of one key store."""

    def __init__(self, directory: str) -> None:
        """Use `directory`; it is made with the first document."""
        self.directory = directory
        self._document = f"{directory}/{DOCUMENT}"
        self._held = -1

    def exists(self) -> bool:
        """Say whether there is a document."""
        return os.path.lexists(self._document)

    def changed(self) -> bool:
        """Say whether the document is another one than `hold` saw."""
        if self._held < 0:
            return True
        try:
            return not os.path.samestat(os.stat(self._document, follow_symlinks=False), os.fstat(self._held))
        except FileNotFoundError:
            return True

    def hold(self) -> None:
        """Remember the document that is there now; for a caller that holds the lock.

        The file is kept open, so that its inode number cannot go to a later one: times are too coarse to tell.
        """
        descriptor = os.open(self._document, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.close()
        self._held = descriptor

    def close(self) -> None:
        """Let go of what `hold` opened."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock; make the directory where it is missing.

        Raises:
            DeniedError: the directory or the lock is not ours alone.
            RetryError: another process holds it for more than 10 seconds.
            StepError: the system refused something, here or while the lock was held (a full disk).
        """
        try:
            with contextlib.suppress(FileExistsError):
                os.makedirs(self.directory, mode=0o700)
            info = os.stat(self.directory, follow_symlinks=False)
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
                raise _unsafe("directory must be yours, mode 0700", self.directory, f"chmod 700 {self.directory}")
            path = f"{self.directory}/lock"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                _take(descriptor, path)
                yield
            finally:
                os.close(descriptor)
        except OSError as error:
            where = str(error.filename or self.directory)
            message = f"the key store cannot be used: {error.strerror}"
            raise StepError("key-store-refused", message, where=where) from error

    def read(self) -> bytes | None:
        """Return the document, or None when there is none.

        Raises:
            DeniedError: it is not a file of ours alone.
        """
        return read_private(self._document, limit=_MAX_BYTES)

    def write(self, document: bytes) -> None:
        """Replace the document: after a crash at any point, the old one or the new one is there."""
        replace(self._document, document)

    # --- a master key of ours ---------------------------------------------------------------------

    @property
    def own_master(self) -> str:
        """Where a generated master key is kept."""
        return f"{self.directory}/{MASTER}"

    def make_master(self, text: str) -> None:
        """Write a generated master key, unless there is one: a key is never written over.

        Raises:
            FileExistsError: there is one.
        """
        fresh = f"{self.own_master}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        _write_new(fresh, f"{text}\n".encode())
        os.link(fresh, self.own_master)  # unlike rename(2), refuses where something stands
        os.unlink(fresh)
        sync_directory(self.directory)


def begin_change(path: str, text: str) -> None:
    """Write the next master key beside the one at `path`; the document is sealed anew after this."""
    drop_next(path)
    _write_new(next_path(path), f"{text}\n".encode())
    sync_directory(os.path.dirname(path))


def finish_change(path: str) -> None:
    """Put the next master key in the place of the old one: the document is sealed with it already."""
    os.rename(next_path(path), path)
    sync_directory(os.path.dirname(path))


def drop_next(path: str) -> None:
    """Forget a next master key with which nothing was sealed."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(next_path(path))


def next_path(path: str) -> str:
    """Return where the next master key stands while it changes."""
    return f"{path}.next"


def read_private(path: str, *, limit: int = _MAX_KEY_BYTES) -> bytes | None:
    """Return a file that only we can read, or None when there is none.

    Raises:
        DeniedError: it is a link, no regular file, too long, of another owner, or open to others.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unsafe(f"file cannot be opened: {error.strerror}", path, "") from error
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise _unsafe("file is not a regular one", path, "")
        if info.st_uid not in (os.geteuid(), 0):
            raise _unsafe("file belongs to another user", path, f"chown {os.geteuid()} {path}")
        if info.st_mode & 0o077:
            raise _unsafe("file can be read or written by others", path, f"chmod 600 {path}")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _unsafe("file is too long", path, "")
    return data


def replace(path: str, data: bytes) -> None:
    """Replace a file by a complete one: written beside, synced, renamed, and the directory synced (rename(2))."""
    fresh = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    _write_new(fresh, data)
    os.rename(fresh, path)
    sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    """Have the entries of a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_new(path: str, data: bytes) -> None:
    descriptor = os.open(path, _NEW, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: str) -> None:
    until = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise RetryError("key-store-busy", "another process holds the key store", where=path) from None
            time.sleep(0.01)
        else:
            return


def _unsafe(what: str, path: str, remedy: str) -> DeniedError:
    return DeniedError("key-store-unsafe", f"the key store's {what}", where=path, remedy=remedy)
