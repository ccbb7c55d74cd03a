"""Have the proxy listen or relay datagrams by SOCKS5."""

import socket

from cloister.prove.inside.support import PROXY, Box

ID = "proxy-socks-commands"
TITLE = "Have the proxy listen or relay datagrams by SOCKS5"
PROMISE = "P-047"
CLASSES = (45, 64)
EXPECT = "only CONNECT is spoken"
SHAPE = "any"


def attack(box: Box) -> None:
    """BIND, UDP ASSOCIATE, unknown commands, SOCKS4 and SOCKS4a, other methods of authentication."""
    for name, command in (("BIND", 2), ("UDP ASSOCIATE", 3), ("RESOLVE of Tor", 0xF0), ("0", 0)):
        reply = talk(b"\x05\x01\x00", 2, bytes([5, command, 0, 1, 127, 0, 0, 1, 0, 80]))
        box.must(len(reply) < 2 or reply[1] != 0, f"{name}: {reply[1:2].hex() or 'closed'}")
    for name, hello in (
        ("SOCKS4", b"\x04\x01\x00\x50\x7f\x00\x00\x01x\0"),
        ("SOCKS4a", b"\x04\x01\x00\x50\x00\x00\x00\x01x\0localhost\0"),
        ("GSSAPI only", b"\x05\x01\x01"),
    ):
        reply = talk(hello, 8, b"")
        box.must(reply[1:2] not in (b"\x5a", b"\x00", b"\x01"), f"{name}: {reply[:2].hex() or 'closed'}")


def talk(first: bytes, expect: int, second: bytes) -> bytes:
    """Say both, return the last answer."""
    with socket.create_connection(PROXY, timeout=3) as connection:
        try:
            connection.sendall(first)
            answer = connection.recv(expect)
            if second and answer:
                connection.sendall(second)
                answer = connection.recv(10)
        except ConnectionError:
            return b""
    return answer
