"""Reach kernel subsystems through netlink, and change the network."""

import socket
import struct

from cloister.prove.inside.support import Box

ID = "net-netlink"
TITLE = "Reach kernel subsystems through netlink, and change the network"
PROMISE = "P-036"
CLASSES = (44, 28)
EXPECT = "only the route family may be used, and it changes nothing"
SHAPE = "any"


def attack(box: Box) -> None:
    """Every other netlink family; a new interface, an address, a route and lo set down through the allowed one."""
    for protocol in [*range(1, 24), 31]:
        box.refused(f"netlink {protocol}", "EPROTONOSUPPORT EAFNOSUPPORT EPERM", make, protocol)
    requests = {
        "a dummy interface": (
            16,
            struct.pack("=BxHiII", 0, 0, 0, 0, 0)
            + struct.pack("=HH8s", 12, 3, b"evil0\0\0\0")
            + struct.pack("=HH", 16, 18)
            + struct.pack("=HH8s", 10, 1, b"dummy\0\0\0"),
        ),
        "an address on lo": (
            20,
            struct.pack("=BBBBi", 2, 24, 0, 0, 1) + struct.pack("=HH4s", 8, 2, socket.inet_aton("192.0.2.9")),
        ),
        "lo down": (16, struct.pack("=BxHiII", 0, 0, 1, 0, 1)),
    }
    for name, (kind, body) in requests.items():
        box.refused(name, "EPERM EACCES EAFNOSUPPORT EOPNOTSUPP", ask, kind, body)


def make(protocol: int) -> None:
    """Make a netlink socket and close it."""
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol).close()


def ask(kind: int, body: bytes) -> None:
    """Send one request with NLM_F_REQUEST, ACK, CREATE; raise what the kernel answers (netlink(7))."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(2)
        sock.bind((0, 0))
        sock.send(struct.pack("=IHHII", 16 + len(body), kind, 0x1 | 0x4 | 0x400, 1, 0) + body)
        answer = sock.recv(8192)
    if struct.unpack_from("=H", answer, 4)[0] == 2:
        number = -struct.unpack_from("=i", answer, 16)[0]
        if number:
            raise OSError(number, "netlink")
