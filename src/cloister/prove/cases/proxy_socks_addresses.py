"""Reach loopback, private and metadata addresses through SOCKS5 by address."""

import socket

from cloister.prove.inside.support import Box

ID = "proxy-socks-addresses"
TITLE = "Reach loopback, private and metadata addresses through SOCKS5 by address"
PROMISE = "P-051"
CLASSES = (46, 47)
EXPECT = "the address guard answers 2, not allowed by ruleset"
SHAPE = "any"
LIFTED_BY = ("egress.private",)


ADDRESSES = (
    "127.0.0.1",
    "127.0.0.2",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "100.100.100.100",
    "169.254.169.254",
    "168.63.129.16",
    "192.0.0.192",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "fd00:ec2::254",
    "fe80::1",
    "fc00::1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "fd20:ce::254",
    "ff02::1",
    "::127.0.0.1",
    "fec0::1",
)


def attack(box: Box) -> None:
    """The listener's port and port 80, by both address types."""
    for text in (*ADDRESSES, *box.fact("host_addresses")):
        packed = (
            b"\x04" + socket.inet_pton(socket.AF_INET6, text)
            if ":" in text
            else b"\x01" + socket.inet_pton(socket.AF_INET, text)
        )
        for port in (int(box.fact("tcp_port")), 80):
            box.socks(f"{text}:{port}", packed, port)
