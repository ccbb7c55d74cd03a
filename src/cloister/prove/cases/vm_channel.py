"""Speak to the host past the guest's first process: its port, vsock, the console."""

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
HOST = 2


def attack(box: Box) -> None:
    """Every port that is there, and every number of the host that may listen."""
    ports = [name for name in os.listdir("/dev") if name.startswith(("vport", "hvc", "virtio"))]
    for name in [*ports, "vport0p1", "vport1p1", "vhost-vsock", "vsock", "ttyS0", "ttyS1"]:
        for flags in (os.O_RDONLY, os.O_WRONLY | os.O_NONBLOCK):
            box.refused(f"/dev/{name}", "ENOENT EACCES EPERM ENXIO EBUSY", os.open, f"/dev/{name}", flags)
    box.refused("AF_VSOCK", "EPERM EAFNOSUPPORT EACCES", vsock)


def vsock() -> None:
    """Connect to the host, as another guest's first process would."""
    with socket.socket(FAMILY, socket.SOCK_STREAM) as link:
        link.settimeout(1)
        link.connect((HOST, 5000))


def twin(box: Box) -> None:
    """The proxy is reached, over the same channel."""
    with socket.create_connection(("127.0.0.1", 3128), 5) as link:
        link.sendall(b"CONNECT nowhere.invalid:443 HTTP/1.1\r\nHost: nowhere.invalid:443\r\n\r\n")
        box.works("an answer of the proxy", link.recv(64).startswith(b"HTTP/1.1 "))
