"""Use rare protocols over IP: SCTP, DCCP, MPTCP, UDP-Lite, L2TP."""

import socket

from cloister.prove.inside.support import Box

ID = "net-protocols"
TITLE = "Use rare protocols over IP: SCTP, DCCP, MPTCP, UDP-Lite, L2TP"
PROMISE = "P-036"
CLASSES = (45, 44)
EXPECT = "seccomp answers EPROTONOSUPPORT or ESOCKTNOSUPPORT"
SHAPE = "any"


PROTOCOLS = {
    "SCTP": (1, 132),
    "SCTP seqpacket": (5, 132),
    "DCCP": (6, 33),
    "MPTCP": (1, 262),
    "UDP-Lite": (2, 136),
    "L2TP": (2, 115),
    "SMC": (1, 256),
    "IGMP": (2, 2),
    "ESP": (2, 50),
}


def attack(box: Box) -> None:
    """Over IPv4 and IPv6."""
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, (kind, protocol) in PROTOCOLS.items():
            box.refused(
                f"{name} over {'IPv4' if family == socket.AF_INET else 'IPv6'}",
                "EPROTONOSUPPORT ESOCKTNOSUPPORT",
                make,
                family,
                kind,
                protocol,
            )


def make(family: int, kind: int, protocol: int) -> None:
    """Make a socket and close it."""
    socket.socket(family, kind, protocol).close()
