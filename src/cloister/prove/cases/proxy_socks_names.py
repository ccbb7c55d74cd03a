"""Reach the host through SOCKS5 by name, also with bytes no name may hold."""

from cloister.prove.inside.support import Box

ID = "proxy-socks-names"
TITLE = "Reach the host through SOCKS5 by name, also with bytes no name may hold"
PROMISE = "P-051"
CLASSES = (46, 53)
EXPECT = "names are parsed strictly before any decision"
SHAPE = "any"
LIFTED_BY = ("egress.private", "egress.mode = learn", "egress.mode = internet")


NAMES = (
    b"localhost",
    b"127.0.0.1",
    b"0x7f.1",
    b"2130706433",
    b"[::1]",
    b"::1",
    b"127.0.0.1\0.example.com",
    b"localhost\0",
    b"example.com\0.127.0.0.1",
    b"localhost.",
    b"LOCALHOST",
    b"a\r\nb",
    b"\x7f\0\0\1",
    b".",
    b"",
    b" localhost",
    b"xn--",
    b"a" * 255,
    b"\xff\xfe",
    b"metadata.google.internal",
    b"cloister.internal.",
    b"169.254.169.254",
)


def attack(box: Box) -> None:
    """To the listener's port."""
    for name in NAMES:
        box.socks(repr(name[:30]), b"\x03" + bytes([len(name)]) + name, int(box.fact("tcp_port")))
