"""A machine's whole state, memory included, out of its monitor and into a file.

    monitor ──migrate──▶ pipe ──▶ a thread of ours ──▶ file

The monitor may have been taken over by its guest. It gets the end of a pipe and never the file: what is kept is no
more than the machine could have, and nobody can change it later.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import threading
import time
from collections.abc import Callable

from cloister.errors import StepError
from cloister.host.qmp import Qmp
from cloister.plan.vm_snapshot import MEMORY

TIMEOUT_S = 120.0
_PIPE = 1 << 20
_PIECE = 1 << 20
_PAGE, _HEAD = 4096, 16
"""Each page of the stream has a head; that of an empty one is all there is of it."""
_DEVICES = 64 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def most(memory_mib: int) -> int:
    """Return how many bytes the state of a machine may have."""
    pages = memory_mib * (1 << 20) // _PAGE
    return pages * (_PAGE + _HEAD) + _DEVICES


class _Reader(threading.Thread):
    """Takes what comes out of a pipe into a file, up to a bound."""

    def __init__(self, source: int, target: int, bound: int, until: float) -> None:
        super().__init__(name="state", daemon=True)
        self._source, self._target, self._bound, self._until = source, target, bound, until
        self.taken = 0
        self.error: OSError | None = None

    def run(self) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Until the end of the pipe; whoever writes more than it may finds it closed."""
        try:
            while data := self._next():
                self.taken += len(data)
                if self.taken > self._bound:
                    raise OSError(errno.EFBIG, "the monitor says more than its machine can hold")  # noqa: TRY301
                view = memoryview(data)
                while view:
                    view = view[os.write(self._target, view) :]
        except OSError as error:
            self.error = error
        finally:
            os.close(self._source)

    def _next(self) -> bytes:
        poll = select.poll()
        poll.register(self._source, select.POLLIN)
        if not poll.poll(max(0.0, self._until - time.monotonic()) * 1000):
            raise OSError(errno.ETIMEDOUT, "the monitor did not write its state in time")
        return os.read(self._source, _PIECE)


def keep_in(monitor: Qmp, directory: str, *, memory_mib: int) -> Callable[[], tuple[str, ...]]:
    """Write the state of a machine into a new file of a directory; return what names that.

    Raises:
        StepError: the monitor failed, or said too much.
        OSError: the file cannot be written.
    """
    keep(monitor, f"{directory}/{MEMORY}", memory_mib=memory_mib)
    return lambda: (MEMORY,)


def keep(monitor: Qmp, path: str, *, memory_mib: int, timeout_s: float = TIMEOUT_S) -> None:
    """Write the state of a machine into a new file; from then on it stands still.

    Args:
        monitor: of a machine that runs.
        path: must not be there.
        memory_mib: of the machine.
        timeout_s: for all of it.

    Raises:
        StepError: the monitor failed, or said too much.
        OSError: the file cannot be written.
    """
    target = os.open(path, _NEW, 0o600)
    try:
        source, sink = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a wish
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _PIPE)
        reader = _Reader(source, target, most(memory_mib), time.monotonic() + timeout_s)
        reader.start()
        try:
            monitor.migrate(sink, shared=False, timeout_s=timeout_s)
        except StepError:
            if reader.error is None:
                raise
        finally:
            os.close(sink)
            reader.join()
        if reader.error is not None:
            raise reader.error
        if not reader.taken:
            raise StepError("snapshot-failed", "the monitor wrote no state", remedy="the same again")
    finally:
        os.close(target)
