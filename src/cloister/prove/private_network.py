"""A network namespace of our own, with one private address on its loopback: to be reached or not, harming nobody.

Needs user namespaces, no privilege. The whole function runs in a forked child, since a process
cannot leave a user namespace again; it may start programs, which are in the namespace as well.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Callable

from cloister.errors import UnsupportedError

ADDRESS = "100.64.7.7"
"""In 100.64.0.0/10, shared address space (RFC 6598)."""
_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_SIOCSIFADDR, _SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8916, 0x8913, 0x8914, 1  # netdevice(7)


def inside(action: Callable[[], bytes]) -> bytes:
    """Run `action` in the namespace; return what it returns.

    Raises:
        UnsupportedError: the namespace cannot be made, or the action failed; its own error is on standard error.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read_end)
            _enter()
            with os.fdopen(write_end, "wb") as file:
                file.write(action())
            code = 0
        except BaseException:  # noqa: BLE001  # the child must not return into the caller's stack
            import traceback

            traceback.print_exc()
        os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        data = file.read()
    _, status = os.waitpid(child, 0)
    if status or not data:
        raise UnsupportedError(
            "ladder-failed",
            "the ladder needs a network namespace of its own, or failed in it",
            remedy="cloister doctor",
        )
    return data


def _enter() -> None:
    """Unshare, keep the own ids, bring loopback up with the address (user_namespaces(7))."""
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWUSER | _NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        flags = struct.unpack_from("H", fcntl.ioctl(sock, _SIOCGIFFLAGS, b"lo".ljust(40, b"\0")), 16)[0]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))
        address = struct.pack("16sHH4s16x", b"lo:1", socket.AF_INET, 0, socket.inet_aton(ADDRESS))
        fcntl.ioctl(sock, _SIOCSIFADDR, address)
