"""Firecracker's way to a guest's vsock: a Unix socket, on which one asks for a port (their docs/vsock.md).

The monitor is not trusted: its socket is opened without following a link, it must be a socket, and a process of ours,
or of the monitor's own number, must listen there. The keeper has the same in C (`shim/keeper_guest.c`), for runs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import time
from collections.abc import Callable

from cloister.errors import StepError

_AGAIN_S = 0.02
_LONGEST = 32
_CREDENTIALS = struct.Struct("iII")


def connect(
    path: str, port: int, *, until: float, lives: Callable[[], bool], owner: int | None = None
) -> socket.socket:
    """Return a stream to a port of the guest, as soon as somebody listens there.

    Args:
        path: of the socket.
        port: of the guest.
        until: when to give up, by `time.monotonic`.
        lives: tells whether the monitor does.
        owner: the uid that the monitor must have; by default ours.

    Raises:
        StepError: `guest-silent`.
    """
    owner = os.geteuid() if owner is None else owner
    while time.monotonic() < until:
        if not lives():
            raise StepError(
                "guest-silent", "the guest did not come up: its monitor has ended", remedy="cloister doctor"
            )
        with contextlib.suppress(OSError):
            if link := _attempt(path, port, owner, max(0.1, until - time.monotonic())):
                return link
        time.sleep(_AGAIN_S)
    raise StepError("guest-silent", "the guest did not come up: it does not listen", remedy="cloister doctor")


def _attempt(path: str, port: int, owner: int, within_s: float) -> socket.socket | None:
    """Return a stream; None where nobody listens in the guest."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.settimeout(within_s)
        _reach(link, path, owner)
        link.sendall(b"CONNECT %d\n" % port)
        line = b""
        while not line.endswith(b"\n") and len(line) < _LONGEST:
            byte = link.recv(1)  # what follows is the guest's
            if not byte:
                break
            line += byte
    except OSError:
        link.close()
        raise
    if line.startswith(b"OK ") and line.endswith(b"\n"):
        link.settimeout(None)
        return link
    link.close()
    return None


def _reach(link: socket.socket, path: str, owner: int) -> None:
    """Connect to exactly this socket: not through a link, which would lead us to another program's.

    Raises:
        OSError: it is none, or not that of the monitor.
    """
    number = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if stat.S_ISSOCK(os.fstat(number).st_mode):
            link.connect(f"/proc/self/fd/{number}")  # a path may be longer than sun_path (unix(7))
    finally:
        os.close(number)
    peer = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if _CREDENTIALS.unpack(peer)[1] != owner:  # also of one that is not connected
        raise OSError("it is no socket of the monitor's")
