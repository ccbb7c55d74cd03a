"""Both ends of the traffic measured by `egress`: a server that sends, and a client that counts.

A program of its own: `python3 traffic.py serve ADDRESS` and `python3 traffic.py ROUTE ADDRESS …`, also inside a
sandbox, so it needs the standard library only. ADDRESS is HOST:PORT or a path.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time

CHUNK = 1 << 20
BYTES = 200 << 20
CONNECTIONS = 200
SMALL = b"s"
LARGE = b"l"


def serve(address: str) -> None:
    """Answer each connection by its first byte: `s` one byte back, `l` 200 MiB, `G` an HTTP response of that."""
    listener = opened(address, listen=True)
    print(listener.getsockname()[1] if ":" in address else address, flush=True)
    block = bytes(CHUNK)
    while True:
        taken, _ = listener.accept()
        threading.Thread(target=answer, args=(taken, block), daemon=True).start()


def answer(taken: socket.socket, block: bytes) -> None:
    """Answer one connection."""
    with taken:
        try:
            first = taken.recv(65536)
            if first[:1] == SMALL:
                taken.sendall(SMALL)
            elif first[:1] in (LARGE, b"G"):
                if first[:1] == b"G":
                    taken.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {BYTES}\r\nConnection: close\r\n\r\n".encode())
                for _ in range(BYTES // CHUNK):
                    taken.sendall(block)
        except OSError:
            return


def opened(address: str, *, listen: bool = False) -> socket.socket:
    """Return a socket that listens at an address, or is connected to it."""
    host, colon, port = address.rpartition(":")
    place: str | tuple[str, int] = (host, int(port)) if colon else address
    sock = socket.socket(socket.AF_INET if colon else socket.AF_UNIX)
    if listen:
        sock.bind(place)
        sock.listen(64)
    else:
        sock.connect(place)
    return sock


def connect(route: str, address: str, target: str) -> socket.socket:
    """Return a connection to the server: straight to it, or by the proxy at `address`."""
    sock = opened(address)
    if route == "connect":
        sock.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(4096)
        assert head.startswith(b"HTTP/1.1 200"), head
    return sock


def transfer(route: str, address: str, target: str) -> float:
    """Take 200 MiB; return MiB per second."""
    into = bytearray(CHUNK)
    started = time.perf_counter()
    with connect(route, address, target) as sock:
        sock.sendall(f"GET http://{target}/ HTTP/1.1\r\nHost: {target}\r\n\r\n".encode() if route == "http" else LARGE)
        taken = 0
        while got := sock.recv_into(into):
            taken += got
            if taken >= BYTES and route == "http":
                break
    assert taken >= BYTES, taken
    return taken / (time.perf_counter() - started) / (1 << 20)


def latency(route: str, address: str, target: str) -> float:
    """Open a connection and exchange one byte, many times; return the median in microseconds."""
    times = []
    for _ in range(CONNECTIONS):
        started = time.perf_counter()
        with connect(route, address, target) as sock:
            sock.sendall(SMALL)
            assert sock.recv(1) == SMALL
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2] * 1e6


def main(argv: list[str]) -> None:
    """Serve, or measure one route and print the two figures."""
    if argv[0] == "serve":
        serve(argv[1])
    else:
        route, address, target = argv
        fast = transfer(route, address, target)
        quick = latency(route, address, target) if route != "http" else 0.0
        print(json.dumps([fast, quick]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)
