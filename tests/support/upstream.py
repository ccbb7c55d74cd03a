"""A small upstream proxy on 127.0.0.1, which is every host of the world as well: it knows CONNECT and nothing else.

A tunnel it opens is answered by itself, so a test has public names without a network. Through a
tunnel it speaks HTTP ("hello from HOST:PORT"), or sends a line again and again to whoever says
TICK. For tests only: a thread per connection, and no limits.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Self


class Upstream:
    """The proxy. A context manager; `asked` holds each CONNECT's authority and Proxy-Authorization."""

    def __init__(self, authorization: str = "") -> None:
        """Listen; with `authorization`, refuse whoever does not present it."""
        self.asked: list[tuple[str, str]] = []
        self._wanted = authorization
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = True
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """`127.0.0.1:PORT`."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def places(self) -> list[str]:
        """What was asked for, in order."""
        return [authority for authority, _ in self.asked]

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        self._open = False
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while self._open:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = _head(connection)
            words = head.split(b"\r\n", 1)[0].decode().split()
            fields = dict(line.decode().lower().split(": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
            given = next((line.split(b": ")[1] for line in head.split(b"\r\n") if line.startswith(b"Proxy-Auth")), b"")
            if len(words) != 3 or words[0] != "CONNECT" or "host" not in fields:
                connection.sendall(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n")
                return
            self.asked.append((words[1], given.decode()))
            if given.decode() != self._wanted:
                connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            self._be(words[1], connection)

    def _be(self, authority: str, connection: socket.socket) -> None:
        """Be the server behind the tunnel."""
        while first := connection.recv(4):
            if first == b"TICK":
                while self._open:
                    connection.sendall(b"tick\n")
                    time.sleep(0.05)
                return
            _head(connection)
            body = f"hello from {authority}\n".encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


def _head(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(4096)
        if not more:
            raise ConnectionResetError
        data += more
    return data
