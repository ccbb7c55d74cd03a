"""What outlives a sensor: its watches, as descriptors that systemd holds while it restarts (`FDSTORE`, sd_notify(3)).

Of each watch it holds what is watched, the connection that asked where the watch ends with it, and a memfd that says
whose it is. Descriptors name the very same cgroup or namespace after a restart, which no path or number would. A file
of this process is not needed, and nobody but root's systemd can change what is kept. Where no systemd is, nothing is
kept. Programs are not kept: those of another version may not fit, so they are loaded anew, and the gap is told.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from typing import NamedTuple

_FIRST = 3
_NAME = "watch-"
_MOST_BYTES = 1 << 16


class Kept(NamedTuple):
    """A watch of the sensor before. Whoever gets it owns its descriptors."""

    text: bytes
    """What was said of it."""
    target: int
    """What is watched; -1 where it was lost."""
    connection: int
    """Who asked; -1 for a watch that does not end with its connection, and where they have left."""


def keep(number: int, text: bytes, descriptors: tuple[int, ...]) -> None:
    """Have systemd hold a watch.

    Raises:
        OSError: it does not.
    """
    words = os.memfd_create("cloister-watch", os.MFD_CLOEXEC)
    try:
        os.write(words, text)
        _send(f"FDSTORE=1\nFDNAME={_NAME}{number}", (words, *descriptors))
    finally:
        os.close(words)


def forget(number: int) -> None:
    """A watch is over."""
    with contextlib.suppress(OSError):
        _send(f"FDSTOREREMOVE=1\nFDNAME={_NAME}{number}", ())


def kept() -> list[Kept]:
    """Return the watches that systemd held for us (sd_listen_fds_with_names(3)); call it once."""
    count = os.environ.pop("LISTEN_FDS", "0")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or not count.isdecimal() or len(names) != int(count):
        return []
    by_name: dict[str, list[int]] = {}
    for descriptor, name in enumerate(names, _FIRST):
        os.set_inheritable(descriptor, False)
        if name.startswith(_NAME):
            by_name.setdefault(name, []).append(descriptor)
        else:
            os.close(descriptor)
    return [_kept(descriptors) for _, descriptors in sorted(by_name.items(), key=lambda one: (len(one[0]), one[0]))]


def _kept(descriptors: list[int]) -> Kept:
    text, target, connection = b"", -1, -1
    for descriptor in descriptors:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):
            connection = descriptor
        elif stat.S_ISREG(mode) and os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:"):
            text = os.pread(descriptor, _MOST_BYTES, 0)
            os.close(descriptor)
        else:
            target = descriptor
    return Kept(text, target, connection)


def _send(state: str, descriptors: tuple[int, ...]) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        socket.send_fds(sock, [state.encode()], list(descriptors))
