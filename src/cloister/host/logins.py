"""The files of logins: one per name, mode 0600, replaced whole, with one writer at a time among all processes.

    logins/NAME.json   what is kept of a login; its meaning is for `credentials/logins.py`
    logins/NAME.lock   flock(2) of whoever renews, makes or removes it; it stays, for a lock file that is
                       removed while somebody waits for it is two locks

A file that others could read or write is refused, not repaired: what was in it is known to somebody else
already. Reading needs no lock, for a file is only ever replaced by rename(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cloister.errors import CloisterError, RetryError, StepError, UsageError

MAX_BYTES = 256 * 1024
LOCK_WAIT_S = 75.0
"""Longer than a renewal may take (`token_endpoint.DEADLINE_S`), name resolution included."""
_POLL_S = 0.02
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")  # policy.values.check_name
Stamp = tuple[int, int, int]


class Shelf:
    """The directory of logins."""

    def __init__(self, directory: str) -> None:
        """Use `directory`, or the one that it is a link to; it is made with the first login."""
        self.directory = os.path.realpath(directory)

    def names(self) -> list[str]:
        """Return the names of all logins."""
        try:
            entries = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        stems = (entry.removesuffix(".json") for entry in entries if entry.endswith(".json"))
        return sorted(stem for stem in stems if _NAME.fullmatch(stem))

    def stamp(self, name: str) -> Stamp | None:
        """Return what changes with every write of a login, or None where there is none."""
        try:
            info = os.lstat(self._path(name))
        except FileNotFoundError:
            return None
        return info.st_ino, info.st_mtime_ns, info.st_size

    def read(self, name: str) -> bytes:
        """Return a login's content.

        Raises:
            UsageError: there is no such login (`login-unknown`).
            CloisterError: the file cannot be trusted or read (`login-unsafe`).
        """
        path = self._path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise unknown(name) from None
        except OSError as error:
            raise _unsafe(path, f"cannot be read: {error.strerror}", name) from error
        with os.fdopen(descriptor, "rb") as file:
            _check(os.fstat(file.fileno()), path, name)
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise _unsafe(path, "is too big for a login", name)
        return data

    @contextmanager
    def held(self, name: str, wait_s: float = LOCK_WAIT_S) -> Iterator[Held]:
        """Be the only one who writes a login, also among processes. Blocks: never call it on an event loop.

        Raises:
            RetryError: somebody else holds it for longer than `wait_s` seconds (`login-busy`).
            StepError: the directory is not ours alone, or cannot be written.
        """
        self._make_directory()
        path = self._path(name).removesuffix(".json") + ".lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StepError("login-not-kept", f"cannot be locked: {error.strerror}", where=path) from error
        try:
            end = time.monotonic() + wait_s
            while not _try_lock(lock):
                if time.monotonic() >= end:
                    raise RetryError("login-busy", f"another process is busy with the login {name!r}", where=path)
                time.sleep(_POLL_S)
            yield Held(self, name)
        finally:
            os.close(lock)

    def _make_directory(self) -> None:
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        info = os.lstat(self.directory)
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            message = "the directory of logins must be yours, and nobody else's to look into"
            raise StepError("login-unsafe", message, where=self.directory, remedy=f"chmod 700 {self.directory}")

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise unknown(name)
        return f"{self.directory}/{name}.json"


class Held:
    """A login that only we write."""

    def __init__(self, shelf: Shelf, name: str) -> None:
        """Take the place of a lock that is held."""
        self._path = shelf._path(name)  # noqa: SLF001  # two halves of one thing
        self._shelf = shelf
        self._name = name

    def read(self) -> bytes:
        """Return the content; raises as `Shelf.read`."""
        return self._shelf.read(self._name)

    def write(self, data: bytes) -> None:
        """Replace the content; when this returns, it outlives a power failure.

        Raises:
            StepError: it cannot be written; the old content stays (`login-not-kept`).
        """
        partial = f"{self._path}.new"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(partial, flags, 0o600), "wb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(partial, self._path)
            _sync_directory(self._shelf.directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            message = f"the login cannot be written: {error.strerror}"
            raise StepError("login-not-kept", message, where=self._path) from error

    def remove(self) -> bool:
        """Remove the login; return whether there was one."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._path}.new")
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            return False
        _sync_directory(self._shelf.directory)
        return True


def unknown(name: str) -> UsageError:
    """Return the error for a login that is not there."""
    return UsageError("login-unknown", f"there is no login {name!r}", remedy=f"cloister login {name}")


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check(info: os.stat_result, path: str, name: str) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise _unsafe(path, "is not a regular file", name)
    if info.st_uid != os.getuid():
        raise _unsafe(path, "belongs to another user", name)
    if info.st_mode & 0o077:
        raise _unsafe(path, "is open to others, who may have read the tokens", name)


def _unsafe(path: str, why: str, name: str) -> CloisterError:
    remedy = f"cloister logout {name}, then cloister login {name}"
    return StepError("login-unsafe", f"the file of the login {name!r} {why}", where=path, remedy=remedy)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
