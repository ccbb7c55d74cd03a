"""Copying a file's data without its holes (lseek(2), SEEK_DATA): a file that is long and empty costs nothing.

And what goes with it: writing all of something at a place, and having it on the disk before something else goes away.
"""

from __future__ import annotations

import errno
import os

_CHUNK = 1 << 20


def copy_data(source: int, target: int, size: int) -> bool:
    """Copy up to `size` bytes between open files, and make the target so long; say whether the source was.

    Raises:
        OSError: one of them cannot be read or written.
    """
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return True  # nothing but a hole up to the end
            raise
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < min(end, size):
            data = os.pread(source, min(_CHUNK, end - at, size - at), at)
            if not data:
                return False
            write_at(target, data, at)
            at += len(data)
    return True


def write_at(target: int, data: bytes | bytearray | memoryview, at: int) -> None:
    """Write all of `data` at a place of a file; pwrite(2) may write less on a disk that is nearly full.

    Raises:
        OSError: the rest cannot be written.
    """
    left = memoryview(data)
    while left:
        written = os.pwrite(target, left, at)
        left, at = left[written:], at + written


def sync_file_system(path: str) -> None:
    """Wait until all that was written to the file system of the directory `path` is on its disk (syncfs(2)).

    Raises:
        OSError: it cannot be opened, or something could not be written.
    """
    import ctypes

    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if library.syncfs(opened):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(opened)
