"""Speak to the host past the guest's first process: its port, vsock, the console."""

import contextlib
import errno
import os
import socket

from cloister.prove.inside.support import Box

ID = "vm-channel"
TITLE = "Speak to the host past the guest's first process: its port, vsock, the console"
PROMISE = "P-852"
CLASSES = (12, 28)
EXPECT = "ports are root's, and sockets of that family cannot be made"
SHAPE = "any"
IF_POLICY = ("microvm",)

FAMILY = 40  # AF_VSOCK
PLACES = ("/dev", "/run/cloister/private/dev")
"""Where programs look, and where the first process keeps its own."""
KNOWN = ("vport0p1", "vport1p1", "vhost-vsock", "vsock", "ttyS0", "ttyS1")


def attack(box: Box) -> None:
    """Every port that is there, those that one could guess, and the family of the host's own address."""
    for place in PLACES:
        ports: list[str] = []
        with contextlib.suppress(OSError):
            ports = [name for name in os.listdir(place) if name.startswith(("vport", "hvc", "virtio"))]
        for name in dict.fromkeys([*ports, *KNOWN]):
            for flags in (os.O_RDONLY, os.O_WRONLY):
                box.refused(f"{place}/{name}", "ENOENT EACCES EPERM", reach, f"{place}/{name}", flags)
    box.refused("AF_VSOCK", "EPERM EAFNOSUPPORT EACCES", vsock)


def reach(path: str, flags: int) -> int | str:
    """Open a port. One that is only busy has let us in: no right was asked for, and its holder may leave."""
    try:
        return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return "busy"
        raise


def vsock() -> bool:
    """Make a socket as another guest's first process would: it could connect to the host, and be connected to."""
    with socket.socket(FAMILY, socket.SOCK_STREAM):
        return True


def twin(box: Box) -> None:
    """The proxy is reached, over the same channel."""
    with socket.create_connection(("127.0.0.1", 3128), 5) as link:
        link.sendall(b"CONNECT nowhere.invalid:443 HTTP/1.1\r\nHost: nowhere.invalid:443\r\n\r\n")
        box.works("an answer of the proxy", link.recv(64).startswith(b"HTTP/1.1 "))
