"""Noticing that a protected file is replaced on the host while a run has it mounted read-only.

Renaming a new file over a mount point removes the mount in other namespaces (namespaces(7): since
Linux 3.18, detach_mounts in fs/namespace.c), so a person's own `git config` during a run would leave `.git/config`
writable for the agent. inotify(7) on the old inodes says so at once: their link count changes. This
only tells; what follows is for the run.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
# linux/inotify.h
_ATTRIBUTES = 0x4
_DELETED = 0x400
_MOVED = 0x800
_NO_LINK = 0x02000000
_NONBLOCK = 0x800
_CLOEXEC = 0x80000
_EVENTS_BYTES = 4096


class Watch:
    """An inotify descriptor over a set of files and directories. Readable when one of them was touched."""

    def __init__(self, paths: Iterable[str]) -> None:
        """Watch what exists; what cannot be watched (ENOSPC: too many watches) is in `missed`.

        Raises:
            OSError: the user has no inotify instance left.
        """
        self.descriptor = _libc.inotify_init1(_NONBLOCK | _CLOEXEC)
        if self.descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.missed = 0
        for path in paths:
            mask = _ATTRIBUTES | _DELETED | _MOVED | _NO_LINK
            if _libc.inotify_add_watch(self.descriptor, os.fsencode(path), mask) < 0:
                self.missed += 1

    def drain(self) -> bool:
        """Read all events away; tell whether there were any."""
        seen = False
        while True:
            try:
                if not os.read(self.descriptor, _EVENTS_BYTES):
                    return seen
                seen = True
            except BlockingIOError:
                return seen

    def close(self) -> None:
        """Stop watching."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
