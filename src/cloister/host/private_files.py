"""Files of ours that hold keys: read only while nobody else could have, replaced as a whole or not at all.

A writer that is killed at any point leaves the old file or the new one. Writers of one
directory take turns by a lock, which the kernel lets go of when its holder dies (flock(2)).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator

_MAX_BYTES = 1 << 20


def read(path: str, limit: int = _MAX_BYTES) -> bytes | None:
    """Return the content, `limit` bytes at most; None when others than this user could have read or written the file.

    None as well when there is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb", closefd=True) as file:
        info = os.fstat(file.fileno())
        safe = stat.S_ISREG(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077
        return file.read(limit) if safe else None


def replace(path: str, data: bytes) -> None:
    """Put a file with this content, readable by this user only, in place of what is there; on disk when this returns.

    Call it under `locked`: two writers would use one name for what is not finished yet.

    Raises:
        OSError: the old file stands.
    """
    partial = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(partial, path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def opener(path: str, flags: int) -> int:
    """Open a file for `open(…, opener=)`: nobody else can read it, no link is followed, no program started has it."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Make a directory of this user's and hold its lock. Waits for another holder.

    Raises:
        OSError: it cannot be made, or belongs to somebody else.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError(1, "the directory belongs to another user", directory)
        os.fchmod(descriptor, 0o700)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
