"""The other side of a made-up internet: TCP and UDP answers on every address, and a DNS server. A script of its own.

Runs in a network namespace that has all the addresses a test wants to reach or be refused; every
answer names the address that was asked, so that a test sees where it got to. Every packet that
arrives is written down, so that a test sees what should not have got here. Standard library only.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
import threading

PUBLIC = ("93.184.216.34", "2606:4700::1111")
PRIVATE = ("10.1.2.3", "fd00::1")
HTTP_PORT, ECHO_PORT, DNS_PORT = 80, 4433, 53
_A, _AAAA = 1, 28
_IP_PKTINFO = 8  # ip(7); Python 3.11 has no name for it
_LOCK = threading.Lock()


def main() -> None:
    """Serve until killed; say so on stdout first. The argument is the file for what arrives."""
    log = open(sys.argv[1], "a", buffering=1, encoding="ascii")  # noqa: SIM115  # until the end
    for family in (socket.AF_INET, socket.AF_INET6):
        _start(_serve_tcp, _bound(family, socket.SOCK_STREAM, HTTP_PORT), log)
        for port in (ECHO_PORT, DNS_PORT):
            _start(_serve_udp, _bound(family, socket.SOCK_DGRAM, port), log)
    print("ready", flush=True)  # noqa: T201
    threading.Event().wait()


def _start(target, *arguments) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


def _bound(family: int, kind: int, port: int) -> socket.socket:
    made = socket.socket(family, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        made.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    made.bind(("", port))
    if kind == socket.SOCK_STREAM:
        made.listen(64)
    return made


def _note(log, what: str, address: str) -> None:
    with _LOCK:
        log.write(f"{what} {address}\n")


def _serve_tcp(listener: socket.socket, log) -> None:
    while True:
        connection, _ = listener.accept()
        address = connection.getsockname()[0]
        _note(log, "tcp", address)
        connection.sendall(f"tcp {address}\n".encode())
        connection.close()


def _serve_udp(server: socket.socket, log) -> None:
    """Answer from the address that was asked (ip(7), ipv6(7): PKTINFO)."""
    while True:
        data, (info, *_), _, peer = server.recvmsg(2000, 200)
        level, kind, value = info
        if level == socket.IPPROTO_IP:
            address = socket.inet_ntop(socket.AF_INET, value[8:12])
            back = (level, kind, bytes(4) + value[8:12] + value[8:12])
        else:
            address = socket.inet_ntop(socket.AF_INET6, value[:16])
            back = (level, kind, value[:16] + bytes(4))
        if server.getsockname()[1] == DNS_PORT:
            _note(log, "dns", address)
            answer = _resolve(data)
        else:
            _note(log, "udp", address)
            answer = f"udp {address}".encode()
        server.sendmsg([answer], [back], 0, peer)


def _resolve(query: bytes) -> bytes:
    """Answer every name with the public addresses, names with `lan` in them with the private ones (RFC 1035)."""
    end = query.index(0, 12) + 5
    wanted = struct.unpack(">H", query[end - 4 : end - 2])[0]
    addresses = PRIVATE if b"lan" in query[12:end] else PUBLIC
    data = {_A: addresses[0], _AAAA: addresses[1]}.get(wanted)
    packed = ipaddress.ip_address(data).packed if data else b""
    record = b"\xc0\x0c" + struct.pack(">HHIH", wanted, 1, 1, len(packed)) + packed if data else b""
    return query[:2] + struct.pack(">HHHHH", 0x8180, 1, 1 if data else 0, 0, 0) + query[12:end] + record


if __name__ == "__main__":
    main()
