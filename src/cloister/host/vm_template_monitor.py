"""The monitor of a machine that becomes a template, or is tried from one: started, heard, ended, whichever it is.

What is asked of it is `vm_template_qemu`'s or `vm_template_firecracker`'s. Its disks are empty placeholders, longer
than any real one, since a guest believes for ever how long a disk is; a monitor refuses what lies behind a real one's
end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
from collections.abc import Iterator, Mapping, Sequence

from cloister.errors import StepError
from cloister.plan.vm import CONSOLE_FD

BOOT_TIMEOUT_S = 120.0
PLACEHOLDER_BYTES = 1 << 40
_LAST_WORDS = 8192
_ABOVE = 100
_SHIM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shim", "cloister-shim")


class Monitor:
    """A started monitor, until its end."""

    def __init__(self, pid: int, console: int) -> None:
        """Take over a process, and the end of the pipe that it and its guest print to."""
        self._pid, self._console = pid, console

    def lives(self) -> bool:
        """Tell whether it has not ended by itself."""
        if self._pid and os.waitpid(self._pid, os.WNOHANG)[0]:
            self._pid = 0
        return self._pid != 0

    def end(self) -> None:
        """Kill it, and wait until it is over."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def explained(self, error: StepError) -> StepError:
        """Return an error with what the guest or its monitor printed last."""
        os.set_blocking(self._console, False)
        poll = select.poll()
        poll.register(self._console, select.POLLIN)
        last = b""
        while poll.poll(200):
            piece = b""
            with contextlib.suppress(BlockingIOError):
                piece = os.read(self._console, 65536)
            if not piece:
                break
            last = (last + piece)[-_LAST_WORDS:]
        lines = [
            "".join(char for char in line if char.isprintable()) for line in last.decode("ascii", "replace").split("\n")
        ]
        told = next((line for line in reversed(lines) if line.strip()), "")
        message = f"{error.message}; last words: {told}" if told else error.message
        return StepError(error.reference, message, remedy=error.remedy)


@contextlib.contextmanager
def started(
    directory: str, argv: Sequence[str], files: Mapping[int, int], disks: Sequence[int], lent: Sequence[int] = ()
) -> Iterator[Monitor]:
    """Start a monitor; end it whatever happens.

    Args:
        directory: where placeholders are made; they have no name afterwards.
        argv: jail included.
        files: number in the monitor → open descriptor here; they stay the caller's.
        disks: numbers of the placeholders of writable disks.
        lent: of ours, closed as soon as the monitor has them, so that one that died is not waited for.
    """
    with contextlib.ExitStack() as stack:

        def owned(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        console, printed = os.pipe()
        owned(console)
        try:
            given = {number: owned(_placeholder(directory, number)) for number in disks}
            pid = spawn(argv, {**files, **given, CONSOLE_FD: printed}, printed)
        finally:
            for descriptor in (printed, *lent):
                os.close(descriptor)
        monitor = Monitor(pid, console)
        stack.callback(monitor.end)
        yield monitor


def spawn(argv: Sequence[str], files: Mapping[int, int], printed: int) -> int:
    """Start a program with exactly these descriptors; what it says itself goes where its guest prints.

    It is killed when we die, from its first instruction on: bubblewrap sees to that a little later.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    moved = {number: fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for number, descriptor in files.items()}
    said = fcntl.fcntl(printed, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
    actions: list[tuple[int, int, int]] = [(os.POSIX_SPAWN_DUP2, null, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, said, number) for number in (1, 2)]
    actions += [(os.POSIX_SPAWN_DUP2, descriptor, number) for number, descriptor in moved.items()]
    try:
        words = [_SHIM, "tied", str(os.getpid()), *argv]
        return os.posix_spawn(_SHIM, words, {"PATH": "/usr/bin:/bin"}, file_actions=actions, setsid=True)
    finally:
        for descriptor in (null, said, *moved.values()):
            os.close(descriptor)


def _placeholder(directory: str, number: int) -> int:
    """Return an empty disk, as long as any could be, that has no name any more."""
    path = f"{directory}/disk{number}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    os.fchmod(descriptor, 0o666)  # without a name, it is only theirs who got it; they may have another number than we
    os.ftruncate(descriptor, PLACEHOLDER_BYTES)
    return descriptor
