"""Ask name servers directly, and carry data out in names."""

import socket

from cloister.prove.inside.support import Box, read

ID = "net-dns-direct"
TITLE = "Ask name servers directly, and carry data out in names"
PROMISE = "P-047"
CLASSES = (48, 49, 50)
EXPECT = "no resolver is in reach"
SHAPE = "any"
LIFTED_BY = ("egress.mode = internet",)


def attack(box: Box) -> None:
    """Through the C library, and each server that resolv.conf names; systemd-resolved's stubs too."""
    for name in ("canary.cloister-prove.example", "metadata.google.internal", "host.docker.internal"):
        try:
            found = socket.getaddrinfo(name, 443)
        except socket.gaierror as error:
            box.stopped(f"{name}: {error.strerror}")
        else:
            box.breach(f"{name}: {found[0][4][0]}")
    servers = [
        line.split()[1]
        for line in read("/etc/resolv.conf", 4000).splitlines()
        if line.startswith("nameserver") and len(line.split()) > 1
    ]
    for server in dict.fromkeys([*servers, "127.0.0.53", "127.0.0.54"]):
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        box.connects(
            f"{server} by TCP", "ECONNREFUSED ENETUNREACH EADDRNOTAVAIL", family, socket.SOCK_STREAM, (server, 53)
        )
