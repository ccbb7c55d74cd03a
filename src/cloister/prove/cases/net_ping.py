"""Send ICMP echo requests."""

import socket

from cloister.prove.inside.support import Box

ID = "net-ping"
TITLE = "Send ICMP echo requests"
PROMISE = "P-047"
CLASSES = (45,)
EXPECT = "no route, and no group may make such sockets"
SHAPE = "any"
LIFTED_BY = ("egress.mode = internet",)


def attack(box: Box) -> None:
    """With unprivileged ping sockets, IPv4 and IPv6."""
    packet = b"\x08\x00\xf7\xff\x00\x00\x00\x00"
    for family, protocol, host in (
        (socket.AF_INET, socket.IPPROTO_ICMP, "192.0.2.1"),
        (socket.AF_INET6, socket.IPPROTO_ICMPV6, "2001:db8::1"),
    ):
        box.refused(
            f"ping {host}",
            "EACCES EPERM ENETUNREACH EADDRNOTAVAIL EAFNOSUPPORT EPROTONOSUPPORT",
            ping,
            family,
            protocol,
            host,
            packet,
        )


def ping(family: int, protocol: int, host: str, packet: bytes) -> None:
    """Send one echo request."""
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as sock:
        sock.sendto(packet, (host, 0))
