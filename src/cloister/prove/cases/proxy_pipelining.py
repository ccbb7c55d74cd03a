"""Begin with an allowed request, and go on to the host on the same connection."""

import socket
import time

from cloister.prove.inside.support import PROXY, Box

ID = "proxy-pipelining"
TITLE = "Begin with an allowed request, and go on to the host on the same connection"
PROMISE = "P-054"
CLASSES = (54,)
EXPECT = "each request on a kept connection is decided by itself"
SHAPE = "any"


def attack(box: Box) -> None:
    """An answered request, then the listener: at once, and after the first answer."""
    here = f"127.0.0.1:{int(box.fact('tcp_port'))}"
    first = b"GET http://cloister.internal/ HTTP/1.1\r\nHost: cloister.internal\r\n\r\n"
    second = f"GET http://{here}/ HTTP/1.1\r\nHost: {here}\r\nConnection: close\r\n\r\n".encode()
    third = f"CONNECT {here} HTTP/1.1\r\nHost: {here}\r\n\r\n".encode()
    for name, parts in (
        ("at once", [first + second]),
        ("later", [first, second]),
        ("a tunnel later", [first, third]),
        ("a tunnel at once", [first + third]),
    ):
        answer = talk(parts)
        statuses = [part[:3].decode("latin-1") for part in answer.split(b"HTTP/1.1 ")[1:]]
        box.must("200" not in statuses[1:], f"{name}: {', '.join(statuses) or 'closed'}")


def talk(parts: list[bytes]) -> bytes:
    """Send the parts with a pause between them; return what came."""
    answer = b""
    with socket.create_connection(PROXY, timeout=1) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(0.1)
            while chunk := connection.recv(65536):
                answer += chunk
        except OSError:
            return answer
    return answer
