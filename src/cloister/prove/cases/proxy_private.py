"""Reach the owner's local network through the proxy."""

from cloister.prove.inside.support import Box

ID = "proxy-private"
TITLE = "Reach the owner's local network through the proxy"
PROMISE = "P-051"
CLASSES = (46, 64)
EXPECT = "private, shared, link-local and the host's own addresses are refused"
SHAPE = "any"
LIFTED_BY = ("egress.private",)


TARGETS = (
    "10.0.0.1",
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "100.127.255.255",
    "169.254.1.1",
    "198.18.0.1",
    "224.0.0.251",
    "255.255.255.255",
    "240.0.0.1",
    "[fc00::1]",
    "[fd00::1]",
    "[fd7a:115c:a1e0::1]",
    "[fe80::1]",
    "[fec0::1]",
    "[ff02::1]",
    "[::ffff:10.0.0.1]",
    "[64:ff9b::a00:1]",
    "[2002:a00:1::]",
)


def attack(box: Box) -> None:
    """Router pages, printers, file servers, and the host itself."""
    own = [f"[{text}]" if ":" in text else text for text in box.fact("host_addresses")]
    for host in (*TARGETS, *own):
        for port in (80, 443, 445):
            box.proxy_refuses(
                f"CONNECT {host}:{port}", f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
            )
