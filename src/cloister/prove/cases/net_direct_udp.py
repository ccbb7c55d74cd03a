"""Send datagrams directly."""

import contextlib
import socket

from cloister.prove.inside.support import Box

ID = "net-direct-udp"
TITLE = "Send datagrams directly"
PROMISE = "P-047"
CLASSES = (45, 50)
EXPECT = "no route; what is sent to loopback stays inside"
SHAPE = "any"
LIFTED_BY = ("egress.mode = internet",)


def attack(box: Box) -> None:
    """Name service, QUIC, multicast name service, time; and the host's own listener, which counts."""
    for host, port in (
        ("192.0.2.1", 53),
        ("192.0.2.1", 443),
        ("192.0.2.1", 853),
        ("192.0.2.1", 123),
        ("224.0.0.251", 5353),
        ("239.255.255.250", 1900),
    ):
        box.connects(
            f"{host}:{port}", "ENETUNREACH EHOSTUNREACH EPERM EACCES", socket.AF_INET, socket.SOCK_DGRAM, (host, port)
        )
    box.connects(
        "[ff02::fb]:5353",
        "ENETUNREACH EADDRNOTAVAIL EHOSTUNREACH EAFNOSUPPORT",
        socket.AF_INET6,
        socket.SOCK_DGRAM,
        ("ff02::fb", 5353),
    )
    for host in box.fact("host_addresses"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        box.connects(
            f"{host}: port 53",
            "ENETUNREACH EADDRNOTAVAIL EHOSTUNREACH EINVAL EAFNOSUPPORT",
            family,
            socket.SOCK_DGRAM,
            (host, 53),
        )
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"cloister-prove", ("127.0.0.1", int(box.fact("udp_port"))))
    box.stopped("sent to 127.0.0.1: the host must not have got it")
