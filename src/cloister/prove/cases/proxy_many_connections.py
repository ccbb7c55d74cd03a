"""Use up the proxy's connections."""

import contextlib
import socket

from cloister.prove.inside.support import PROXY, Box

ID = "proxy-many-connections"
TITLE = "Use up the proxy's connections"
PROMISE = "P-060"
CLASSES = (85,)
EXPECT = "a bound per run; the proxy still answers afterwards"
SHAPE = "any"


def attack(box: Box) -> None:
    """Four hundred idle connections, half of them with a head that never ends."""
    held = []
    with contextlib.suppress(OSError):
        for number in range(400):
            connection = socket.create_connection(PROXY, timeout=2)
            if number % 2:
                connection.sendall(b"GET http://cloister.internal/ HTTP/1.1\r\nX")
            held.append(connection)
    for connection in held:
        connection.close()
    answer = b""
    for _ in range(20):
        with contextlib.suppress(OSError):
            answer = box.http(
                b"GET http://cloister.internal/ HTTP/1.1\r\nHost: cloister.internal\r\nConnection: close\r\n\r\n", 1.0
            )
        if answer.startswith(b"HTTP/1.1 200"):
            break
    box.must(answer.startswith(b"HTTP/1.1 200"), f"after {len(held)} connections: it answers")
