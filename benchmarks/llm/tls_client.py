"""A client of TLS through a proxy: new connections, requests on a kept one, and one large answer.

A program of its own, standard library only, so that it can be pinned: `python3 tls_client.py PROXY HOST:PORT CA WHAT`.
PROXY is HOST:PORT, the path of a Unix socket, or `-` for none; WHAT is `connect`, `request` or `download`. Prints the
median in microseconds, how many there were, and the seconds they took.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import time

COUNTS = {"connect": 150, "request": 1000, "download": 1}
LARGE = 256 << 20
ASK = "GET /{path} HTTP/1.1\r\nHost: {target}\r\nAuthorization: Bearer {token}\r\n\r\n"


class Client:
    """Connections to one server through one proxy."""

    def __init__(self, proxy: str, target: str, ca: str, token: str) -> None:
        """Make the context: certificates are verified against `ca`, which is the proxy's where TLS ends there."""
        self.proxy, self.target, self.token = proxy, target, token
        self.context = ssl.create_default_context(cafile=ca)
        self.context.set_alpn_protocols(["http/1.1"])

    def open(self) -> ssl.SSLSocket:
        """Connect, through the proxy where there is one, and shake hands."""
        host, _, port = self.target.rpartition(":")
        if self.proxy == "-":
            sock = socket.create_connection(("127.0.0.1", int(port)))
        elif self.proxy.startswith("/"):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.proxy)
        else:
            address, _, number = self.proxy.rpartition(":")
            sock = socket.create_connection((address, int(number)))
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.proxy != "-":
            sock.sendall(f"CONNECT {self.target} HTTP/1.1\r\nHost: {self.target}\r\n\r\n".encode())
            head = b""
            while b"\r\n\r\n" not in head:
                head += sock.recv(4096)
            assert head.split(b" ", 2)[1] == b"200", head
        return self.context.wrap_socket(sock, server_hostname=host)

    def ask(self, sock: ssl.SSLSocket, path: str) -> int:
        """Send a request, read its whole answer, return the length of the body."""
        sock.sendall(ASK.format(path=path, target=self.target, token=self.token).encode())
        data = b""
        while b"\r\n\r\n" not in data:
            data += sock.recv(65536)
        head, _, rest = data.partition(b"\r\n\r\n")
        assert head.split(b" ", 2)[1] == b"200", head
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        into, taken = bytearray(1 << 18), len(rest)
        while taken < length:
            taken += sock.recv_into(into)
        return length

    def connect(self) -> None:
        """Open a connection for one request."""
        with self.open() as sock:
            self.ask(sock, "small")


def main(proxy: str, target: str, ca: str, token: str, what: str) -> None:
    """Measure one thing."""
    client = Client(proxy, target, ca, token)
    times = []
    with client.open() as kept:
        for _ in range(COUNTS[what]):
            began = time.perf_counter()
            if what == "connect":
                client.connect()
            elif what == "request":
                client.ask(kept, "small")
            else:
                assert client.ask(kept, "large") == LARGE
            times.append(time.perf_counter() - began)
    print(json.dumps({"us": sorted(times)[len(times) // 2] * 1e6, "count": len(times), "seconds": sum(times)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
