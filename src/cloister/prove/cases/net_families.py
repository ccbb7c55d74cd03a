"""Make sockets of rare families: VSOCK, ALG, BLUETOOTH, RDS, TIPC, XDP, CAN, KEY and the rest."""

import socket

from cloister.prove.inside.support import Box

ID = "net-families"
TITLE = "Make sockets of rare families: VSOCK, ALG, BLUETOOTH, RDS, TIPC, XDP, CAN, KEY and the rest"
PROMISE = "P-036"
CLASSES = (44, 28)
EXPECT = "an allowlist of four families"
SHAPE = "any"


ALLOWED = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK}


def attack(box: Box) -> None:
    """Every number that Linux has used, and some that it has not; each type; pairs too."""
    for family in [*range(47), 63, 255, 1 << 16]:
        if family in ALLOWED:
            continue
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            box.refused(f"family {family}", "EAFNOSUPPORT EPERM", make, family, kind)
        box.refused(f"pair of {family}", "EAFNOSUPPORT EPERM", pair, family)


def make(family: int, kind: int) -> None:
    """Make a socket and close it."""
    socket.socket(family, kind, 0).close()


def pair(family: int) -> None:
    """Make a pair and close it."""
    for each in socket.socketpair(family, socket.SOCK_STREAM):
        each.close()
