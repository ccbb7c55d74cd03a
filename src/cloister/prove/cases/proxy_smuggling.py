"""Hide a second request in the body of the first."""

import contextlib
import socket
import time

from cloister.prove.inside.support import PROXY, Box

ID = "proxy-smuggling"
TITLE = "Hide a second request in the body of the first"
PROMISE = "P-053"
CLASSES = (54,)
EXPECT = "ambiguous framing is refused; every request is decided by itself"
SHAPE = "any"


def attack(box: Box) -> None:
    """Lengths against chunks, odd chunk sizes, bare line ends, folded headers; the host's listener counts."""
    hidden = f"GET http://127.0.0.1:{int(box.fact('tcp_port'))}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    size = str(len(hidden)).encode()
    framings = {
        "length and chunks": b"Content-Length: " + size + b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
        "two lengths": b"Content-Length: 0\r\nContent-Length: " + size + b"\r\n\r\n" + hidden,
        "a list of lengths": b"Content-Length: 0, " + size + b"\r\n\r\n" + hidden,
        "signed length": b"Content-Length: +" + size + b"\r\n\r\n" + hidden,
        "chunked twice": b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + hidden,
        "space before the colon": b"Transfer-Encoding : chunked\r\nContent-Length: "
        + size
        + b"\r\n\r\n0\r\n\r\n"
        + hidden,
        "unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + hidden,
        "folded header": b"X: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
        "bare line feed": b"X: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
        "huge chunk size": b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + hidden,
        "NUL in a header": b"X: a\0b\r\nContent-Length: 0\r\n\r\n" + hidden,
    }
    for name, framing in framings.items():
        answer = send(b"POST http://cloister.internal/ HTTP/1.1\r\nHost: cloister.internal\r\n" + framing)
        statuses = [part[:3].decode("latin-1") for part in answer.split(b"HTTP/1.1 ")[1:]]
        box.stopped(f"{name}: {', '.join(statuses) or 'closed'}")


def send(data: bytes) -> bytes:
    """Send everything, return everything that comes within a short time."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(PROXY, timeout=0.5) as connection:
        connection.sendall(data)
        end = time.monotonic() + 0.5
        while time.monotonic() < end and (chunk := connection.recv(65536)):
            answer += chunk
            if len(answer.split(b"HTTP/1.1 ")) > 2:
                break
    return answer
