"""Reach another agent's run, on loopback and through the proxy."""

import socket

from cloister.prove.inside.support import Box

ID = "net-neighbour-run"
TITLE = "Reach another agent's run, on loopback and through the proxy"
PROMISE = "P-047"
CLASSES = (63,)
EXPECT = "each run has a network namespace of its own, and the proxy dials no loopback"
SHAPE = "any"
NEEDS = ("sibling",)


def attack(box: Box) -> None:
    """The neighbour listens on a port of its loopback."""
    port = int(box.fact("sibling")["port"])
    box.connects("direct", "ECONNREFUSED", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port))
    box.proxy_refuses("CONNECT", f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    box.proxy_refuses("GET", f"GET http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    box.socks("SOCKS", b"\x01\x7f\x00\x00\x01", port)
