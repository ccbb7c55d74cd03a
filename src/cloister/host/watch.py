"""Noticing that a protected file is replaced on the host while a run has it mounted read-only.

Renaming a new file over a mount point removes the mount in other namespaces (since Linux 3.18,
detach_mounts() in fs/namespace.c), so a person's own `git config` during a run would leave
`.git/config` writable for the agent. inotify(7) on the old inodes says so at once: their link count
changes. This only tells; what follows is for the run.

One descriptor serves all runs and stays open: closing one waits for a grace period of the kernel
(measured: 40 ms; fsnotify_wait_marks_destroyed()), taking single watches away does not.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
# linux/inotify.h
_ATTRIBUTES = 0x4
_DELETED = 0x400
_MOVED = 0x800
_OVERFLOW = 0x4000
_NONBLOCK = 0x800
_CLOEXEC = 0x80000
_EVENT = struct.Struct("iIII")
_EVENTS_BYTES = 1 << 16


class Watch:
    """Watches on files and directories, each for one or more runs. Readable when one of them was touched."""

    def __init__(self) -> None:
        """Make the descriptor.

        Raises:
            OSError: the user has no inotify instance left.
        """
        self.descriptor = _libc.inotify_init1(_NONBLOCK | _CLOEXEC)
        if self.descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._runs: dict[int, set[str]] = {}

    def add(self, run: str, paths: Iterable[str]) -> int:
        """Watch `paths` for a run; return how many could not be watched (gone, or ENOSPC: too many watches)."""
        missed = 0
        for path in paths:
            watched = _libc.inotify_add_watch(self.descriptor, os.fsencode(path), _ATTRIBUTES | _DELETED | _MOVED)
            if watched < 0:
                missed += 1
            else:
                self._runs.setdefault(watched, set()).add(run)
        return missed

    def remove(self, run: str) -> None:
        """Forget a run; what no other run watches is watched no longer."""
        for watched, runs in list(self._runs.items()):
            runs.discard(run)
            if not runs:
                del self._runs[watched]
                _libc.inotify_rm_watch(self.descriptor, watched)

    def touched(self) -> set[str]:
        """Read what has happened; return the runs it concerns: all of them when events were lost."""
        runs: set[str] = set()
        while True:
            try:
                data = os.read(self.descriptor, _EVENTS_BYTES)
            except BlockingIOError:
                return runs
            offset = 0
            while offset < len(data):
                watched, mask, _, length = _EVENT.unpack_from(data, offset)
                offset += _EVENT.size + length
                if mask & _OVERFLOW:
                    runs.update(*self._runs.values())
                else:
                    runs |= self._runs.get(watched, set())

    def close(self) -> None:
        """Stop watching."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
