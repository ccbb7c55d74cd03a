"""Smuggle a host past the rules with NUL, line ends, user names, escapes."""

from cloister.prove.inside.support import Box

ID = "proxy-host-bytes"
TITLE = "Smuggle a host past the rules with NUL, line ends, user names, escapes"
PROMISE = "P-053"
CLASSES = (53,)
EXPECT = "ambiguous names are refused, not repaired"
SHAPE = "any"


def attack(box: Box) -> None:
    """Each form names the host's listener for one reader and something else for another."""
    port = str(int(box.fact("tcp_port"))).encode()
    here = b"127.0.0.1:" + port
    for host in (
        b"example.com\0." + here,
        here + b"\0.example.com",
        b"example.com@" + here,
        b"example.com:80@" + here,
        here + b"#@example.com",
        here + b"?@example.com",
        here + b"\\@example.com",
        b"example.com%00@" + here,
        b"example.com%0d%0a@" + here,
        b"\t" + here,
        b"example.com\\" + here,
        b"user:pass@" + here,
        here + b"/../example.com",
    ):
        box.proxy_refuses(f"CONNECT {host!r}", b"CONNECT " + host + b" HTTP/1.1\r\nHost: example.com\r\n\r\n")
        box.proxy_refuses(
            f"GET {host!r}", b"GET http://" + host + b"/ HTTP/1.1\r\nHost: example.com\r\nConnection: close\r\n\r\n"
        )
