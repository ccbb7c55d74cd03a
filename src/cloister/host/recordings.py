"""The file of a recording: made once, appended to, read by its owner only. `llm/recording` knows its bytes."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import IO

from cloister.errors import DeniedError


class Appendix:
    """A new file that only grows, by whole pieces. Used by one thread at a time."""

    __slots__ = ("_descriptor", "_size")

    def __init__(self, path: str) -> None:
        """Make it, for this user alone.

        Raises:
            OSError: there is one already, or the system refuses.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._size = 0

    def append(self, piece: bytes) -> None:
        """Write a piece.

        Raises:
            OSError: it could not be written whole; what was written of it is taken back where that is possible.
        """
        left = memoryview(piece)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(piece)

    def close(self) -> None:
        """Bring it to the disk and close it.

        Raises:
            OSError: the disk refused; it is closed all the same.
        """
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


@contextlib.contextmanager
def reading(path: str) -> Iterator[Callable[[int], bytes]]:
    """Give what reads a file of this user.

    Raises:
        DeniedError: somebody else could have read or written it.
        OSError: it is not there, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    file: IO[bytes]
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise DeniedError(
                "recording-unsafe", "a recording belongs to its owner alone, mode 0600", where=path,
                remedy=f"look who changed it; then chmod 600 {path}",
            )  # fmt: skip
        yield file.read
