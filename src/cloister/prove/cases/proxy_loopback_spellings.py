"""Reach the host's loopback through the proxy by every spelling of its address."""

from cloister.prove.inside.support import Box

ID = "proxy-loopback-spellings"
TITLE = "Reach the host's loopback through the proxy by every spelling of its address"
PROMISE = "P-051"
CLASSES = (46, 64)
EXPECT = "one normal form before any decision"
SHAPE = "any"
LIFTED_BY = ("egress.private",)


SPELLINGS = (
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "017700000001",
    "127.0.0.1.",
    "127.255.255.254",
    "0",
    "0.0.0.0",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "localhost.localdomain",
    "ip6-localhost",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::]",
    "[::ffff:0:127.0.0.1]",
    "[fe80::1%25lo]",
    "[::1%lo]",
    "[fe80::5efe:7f00:1]",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "127.0.0.1%00.example.com",
    "%31%32%37.0.0.1",
    "127.0.0.01",
    "00127.0.0.1",
    "127.0.0.1 ",
    "::1",
    "loopback",
    "1.0.0.127.in-addr.arpa",
    "127.0.0.1.nip.io",
    "localtest.me",
)


def attack(box: Box) -> None:
    """Tunnels and plain requests to the host's listener, which counts."""
    port = int(box.fact("tcp_port"))
    learning = box.facts.get("egress_mode") in {"learn", "internet"}
    for host in SPELLINGS:
        if learning and host in ("127.0.0.1.nip.io", "localtest.me"):
            continue
        target = f"{host}:{port}".encode()
        box.proxy_refuses(f"CONNECT {host}", b"CONNECT " + target + b" HTTP/1.1\r\nHost: " + target + b"\r\n\r\n")
        box.proxy_refuses(
            f"GET {host}", b"GET http://" + target + b"/ HTTP/1.1\r\nHost: " + target + b"\r\nConnection: close\r\n\r\n"
        )
