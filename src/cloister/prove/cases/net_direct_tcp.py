"""Connect directly by TCP over IPv4."""

import socket

from cloister.prove.inside.support import Box

ID = "net-direct-tcp"
TITLE = "Connect directly by TCP over IPv4"
PROMISE = "P-047"
CLASSES = (45,)
EXPECT = "no route: ENETUNREACH; the loopback is the sandbox's own"
SHAPE = "any"
LIFTED_BY = ("egress.mode = internet",)


def attack(box: Box) -> None:
    """The host on loopback, the host by its addresses, and addresses that are nobody's (TEST-NET)."""
    port = int(box.fact("tcp_port"))
    for host in ("127.0.0.1", "127.0.0.2", "0.0.0.0"):
        box.connects(f"{host}:{port}", "ECONNREFUSED ENETUNREACH", socket.AF_INET, socket.SOCK_STREAM, (host, port))
    for host in (
        "192.0.2.1",
        "198.51.100.1",
        "10.0.0.1",
        "100.64.0.1",
        "169.254.169.254",
        *(text for text in box.fact("host_addresses") if ":" not in text),
    ):
        for each in (80, 443, port):
            box.connects(f"{host}:{each}", "ENETUNREACH EHOSTUNREACH", socket.AF_INET, socket.SOCK_STREAM, (host, each))
