"""Copying a file's data without its holes (lseek(2), SEEK_DATA): a file that is long and empty costs nothing."""

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
            os.pwrite(target, data, at)
            at += len(data)
    return True
