"""Fill the proxy's memory with endless headers."""

import socket

from cloister.prove.inside.support import PROXY, Box

ID = "proxy-oversized"
TITLE = "Fill the proxy's memory with endless headers"
PROMISE = "P-060"
CLASSES = (85,)
EXPECT = "a bounded head, then the end of the connection"
SHAPE = "any"


def attack(box: Box) -> None:
    """A long line, a long header, and thousands of headers; at most 8 MiB each."""
    start = b"GET http://cloister.internal/ HTTP/1.1\r\nHost: cloister.internal\r\n"
    for name, begin, block in (
        ("a long line", b"GET http://cloister.internal/", b"a" * 65536),
        ("a long header", start + b"X: ", b"a" * 65536),
        ("many headers", start, b"X: y\r\n" * 10000),
    ):
        box.must(cut_off(begin, block), f"{name}: cut off")


def cut_off(begin: bytes, block: bytes) -> bool:
    """Send until the other end answers or closes; tell whether it did within 8 MiB."""
    with socket.create_connection(PROXY, timeout=3) as connection:
        try:
            connection.sendall(begin)
            for _ in range(128):
                connection.sendall(block)
        except OSError:
            return True
        try:
            return not connection.recv(64).startswith(b"HTTP/1.1 2")
        except TimeoutError:
            return False
        except OSError:
            return True
