"""A file without a name that holds some bytes: for programs that read what they are given by descriptor."""

from __future__ import annotations

import os


def memory_file(name: str, data: bytes, *, inheritable: bool = False) -> int:
    """Return a descriptor that reads `data` from its start (memfd_create(2)); the caller closes it.

    Args:
        name: shown in /proc/PID/fd, for people.
        data: its content.
        inheritable: let every program that is started from here on have it (no FD_CLOEXEC).

    Raises:
        OSError: the kernel has no room.
    """
    descriptor = os.memfd_create(name, 0 if inheritable else os.MFD_CLOEXEC)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
