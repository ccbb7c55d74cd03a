"""Make raw and packet sockets."""

import socket

from cloister.prove.inside.support import Box

ID = "net-raw"
TITLE = "Make raw and packet sockets"
PROMISE = "P-036"
CLASSES = (45, 44)
EXPECT = "seccomp allows stream and datagram sockets only"
SHAPE = "any"


def attack(box: Box) -> None:
    """IPv4, IPv6, link layer; with the flags in the type too."""
    for family in (socket.AF_INET, socket.AF_INET6):
        for protocol in (0, 1, 6, 17, 255):
            for flags in (0, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK):
                box.refused(
                    f"raw {family} {protocol}",
                    "ESOCKTNOSUPPORT EPROTONOSUPPORT EPERM",
                    make,
                    family,
                    socket.SOCK_RAW | flags,
                    protocol,
                )
    for kind in (socket.SOCK_RAW, socket.SOCK_DGRAM, 10):
        box.refused(f"packet {kind}", "EAFNOSUPPORT EPERM", make, socket.AF_PACKET, kind, 0x0300)


def make(family: int, kind: int, protocol: int) -> None:
    """Make a socket and close it."""
    socket.socket(family, kind, protocol).close()


def twin(box: Box) -> None:
    """Plain sockets can be made."""
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        make(family, socket.SOCK_STREAM, 0)
        make(family, socket.SOCK_DGRAM, 0)
    box.works("sockets", True)
