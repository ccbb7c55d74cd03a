"""What a monitor writes of its living guest, where it takes no pipe: two files that it has had from its start.

    monitor ──writes──▶ file without a name, memfd ──(the guest goes on)──▶ copies in the snapshot

Firecracker sets the length of the memory's file and syncs both, so neither can be a pipe; and a process that runs can
be handed nothing more. The monitor may have been taken over by its guest: it has these files at any time, and the
keeper lets none of its files grow beyond its largest (shim/keeper_monitor.c, bound_files). What counts is their length
and what is copied; the copies are ours alone. The memory is on a disk, since as pages in memory it would count once
more against the run's limit.
"""

from __future__ import annotations

import os
import threading

from cloister.errors import RetryError, StepError
from cloister.host import vm_memory
from cloister.plan.vm_snapshot import MEMORY, STATE

_MOST_STATE = 64 << 20
_NAME = "memory.out"
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Sheets:
    """Both files, borrowed for one snapshot: they stay open although the machine's end may come meanwhile."""

    def __init__(self, memory: int, state: int, size: int) -> None:
        """Take two descriptors, and the bytes that the memory must have."""
        self._files, self._bytes = (memory, state), size

    def empty(self) -> None:
        """Forget what was written, and give back its room."""
        for descriptor in self._files:
            os.ftruncate(descriptor, 0)

    def take(self, directory: str) -> tuple[str, ...]:
        """Copy what was written into new files of a directory; return their names.

        Raises:
            StepError: it is not what such a machine has.
            OSError: it cannot be copied, or changes meanwhile.
        """
        try:
            memory, state = (os.fstat(descriptor).st_size for descriptor in self._files)
            if memory != self._bytes:
                raise _failed(f"a memory of {memory} bytes, of a guest that has {self._bytes}")
            if not 0 < state <= _MOST_STATE:
                raise _failed(f"a state of {state} bytes")
            for name, source, size in zip((MEMORY, STATE), self._files, (memory, state), strict=True):
                target = os.open(f"{directory}/{name}", _NEW, 0o600)
                try:
                    os.ftruncate(target, size)
                    vm_memory.copy(source, target, size)
                finally:
                    os.close(target)
        finally:
            self.empty()
        return MEMORY, STATE

    def close(self) -> None:
        """Give them back."""
        for descriptor in self._files:
            os.close(descriptor)


class Written:
    """Those of one machine. Whoever made it calls `close` in the end."""

    def __init__(self) -> None:
        """Make nothing."""
        self._memory = self._state = -1
        self._bytes = 0
        self._lock = threading.Lock()

    def make(self, directory: str, memory_mib: int) -> list[int]:
        """Make both, the memory's as long as the memory; return descriptors of memory and state, the caller's.

        Raises:
            StepError: there is no room.
        """
        path = f"{directory}/{_NAME}"
        self._bytes = memory_mib << 20
        try:
            self._memory = os.open(path, _NEW, 0o600)
            os.unlink(path)
            os.ftruncate(self._memory, self._bytes)
            self._state = os.memfd_create(STATE, os.MFD_CLOEXEC)  # nobody may seal it: it is emptied again
            return [os.dup(self._memory), os.dup(self._state)]
        except OSError as error:
            message = f"there is no place to keep the machine: {error.strerror or error}"
            raise StepError("snapshot-failed", message, where=directory) from None

    def lend(self) -> Sheets:
        """Return both for a snapshot; the caller closes them. May be called beside `close`.

        Raises:
            RetryError: the machine has ended.
        """
        with self._lock:
            if self._memory < 0:
                raise RetryError("run-ending", "the run is ending")
            return Sheets(os.dup(self._memory), os.dup(self._state), self._bytes)

    def close(self) -> None:
        """Let go of both."""
        with self._lock:
            for descriptor in (self._memory, self._state):
                if descriptor >= 0:
                    os.close(descriptor)
            self._memory = self._state = -1


def _failed(what: str) -> StepError:
    return StepError("snapshot-failed", f"the monitor wrote {what}", remedy="the same again")
