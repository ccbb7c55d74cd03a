"""Look for a network interface that leads out."""

import socket

from cloister.prove.inside.support import Box, read

ID = "net-interfaces"
TITLE = "Look for a network interface that leads out"
PROMISE = "P-047"
CLASSES = (45,)
EXPECT = "an empty network namespace: loopback and nothing else"
SHAPE = "any"
LIFTED_BY = ("egress.mode = internet",)


def attack(box: Box) -> None:
    """By name, by counters, by routes and addresses."""
    names = [line.split(":")[0].strip() for line in read("/proc/net/dev", 8000).splitlines()[2:]]
    box.must(names == ["lo"], f"interfaces: {', '.join(names)}")
    box.must(len(read("/proc/net/route", 4000).splitlines()) <= 1, "routes: none")
    leads = [line for line in read("/proc/net/ipv6_route", 8000).splitlines() if line.split()[-1] != "lo"]
    box.must(not leads, "IPv6 routes: only loopback")
    neighbours = read("/proc/net/arp", 4000).splitlines()
    box.must(len(neighbours) <= 1, "neighbours: none")


def twin(box: Box) -> None:
    """Loopback works: development servers need it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=2) as client,
    ):
        client.sendall(b"x")
        box.works("loopback", server.accept()[0].recv(1) == b"x")
