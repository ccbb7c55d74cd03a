"""A bubblewrap that lost its other half on the way: it waits for ever, so the broker ends it.

bubblewrap clones, and its child waits for the parent's word on an eventfd that the child holds
itself; only afterwards does `--die-with-parent` bind the two (bubblewrap.c, version 0.8). Whoever
kills the parent within that millisecond leaves the child. It has run nothing of the agent, and its
command line is still that of its parent: by that it is found. This ends nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence

_DYING_S = 1.0
"""How long to wait for the outer half: its connection closes before the kernel tells bubblewrap (exit_notify())."""
_PASSES = 5


def end_stranded(run: str, argv: Sequence[str], outer: int = 0) -> int:
    """End what is left of a sandbox whose first process never spoke; return how many processes that were. May wait.

    Args:
        run: its id, which must stand in `argv`: else it could be that of another run.
        argv: as bubblewrap was started.
        outer: the process number of its outer half, where that is about to end.
    """
    line = b"".join(os.fsencode(word) + b"\0" for word in argv)
    if not run or os.fsencode(run) not in line:
        return 0
    until = time.monotonic() + _DYING_S
    while outer and _runs(outer) and time.monotonic() < until:
        time.sleep(0.005)
    ended: set[int] = set()
    for _ in range(_PASSES):  # what was being cloned while we looked is there at the next look
        found = {int(name) for name in os.listdir("/proc") if name.isdigit() and _end(int(name), line)}
        if found <= ended:
            break
        ended |= found
    return len(ended)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in {b"Z", b"X"}
    except (OSError, IndexError):
        return False


def _end(pid: int, line: bytes) -> bool:
    """Kill a process if its command line is this one; a number that changes hands meanwhile is safe (pidfd_open(2))."""
    if _line(pid) != line:
        return False
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            if _line(pid) == line:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
        finally:
            os.close(descriptor)
    return False


def _line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""
