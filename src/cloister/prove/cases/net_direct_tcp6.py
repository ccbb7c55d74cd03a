"""Connect directly by TCP over IPv6, also to IPv4 addresses in IPv6 form."""

import socket

from cloister.prove.inside.support import Box

ID = "net-direct-tcp6"
TITLE = "Connect directly by TCP over IPv6, also to IPv4 addresses in IPv6 form"
PROMISE = "P-047"
CLASSES = (45, 46)
EXPECT = "no route"
SHAPE = "any"
LIFTED_BY = ("egress.mode = internet",)


def attack(box: Box) -> None:
    """Loopback, mapped loopback, documentation, unique local, link-local, the host's own."""
    port = int(box.fact("tcp_port"))
    refused = "ECONNREFUSED ENETUNREACH EADDRNOTAVAIL EHOSTUNREACH EINVAL EAFNOSUPPORT"
    for host in ("::1", "::", "::ffff:127.0.0.1", "::ffff:0:0"):
        for each in {port, int(box.facts.get("tcp6_port", port))}:
            box.connects(f"[{host}]:{each}", refused, socket.AF_INET6, socket.SOCK_STREAM, (host, each))
    for host in (
        "2001:db8::1",
        "::ffff:192.0.2.1",
        "fd00:ec2::254",
        "fe80::1",
        "64:ff9b::c000:201",
        *(text for text in box.fact("host_addresses") if ":" in text),
    ):
        box.connects(
            f"[{host}]:80", refused.replace("ECONNREFUSED ", ""), socket.AF_INET6, socket.SOCK_STREAM, (host, 80)
        )
