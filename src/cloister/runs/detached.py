"""The outer half of a detached run: started by the broker, its output in the run's records."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Any

from cloister.runs.links import Connect
from cloister.runs.prepare import SHIM


def detach(loop: asyncio.AbstractEventLoop, connect: Connect, output_path: str, caller: int) -> tuple[Any, int]:
    """Start the outer half, with the umask of the process `caller`; return its link and pid.

    It is collected when it ends.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    output = os.open(output_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    theirs.set_inheritable(True)
    try:
        actions = [
            (os.POSIX_SPAWN_DUP2, null, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ]
        words = [SHIM, "outer", str(theirs.fileno()), _umask(caller)]
        pid = os.posix_spawn(SHIM, words, {}, file_actions=actions, setsid=True)
    finally:
        os.close(output)
        os.close(null)
        theirs.close()
    _reap(loop, pid)
    return connect(ours, lambda *_: None, lambda *_: None), pid


def detached_stdio(output_path: str) -> tuple[int, int, int]:
    """Return what a detached agent in a guest gets as its standard streams; whoever gets them closes them."""
    output = os.open(output_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), output, os.dup(output)


def _umask(pid: int) -> str:
    """Return the umask of a process in octal; ours, which is narrow, when it has gone (proc(5), Linux 4.7)."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return line.split()[1]
    return "077"


def _reap(loop: asyncio.AbstractEventLoop, pid: int) -> None:
    """Collect the outer half when it ends."""
    descriptor = os.pidfd_open(pid)

    def ready() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)

    loop.add_reader(descriptor, ready)
