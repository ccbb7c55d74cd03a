"""Turn the proxy against itself, its control names, and files."""

from cloister.prove.inside.support import Box

ID = "proxy-itself"
TITLE = "Turn the proxy against itself, its control names, and files"
PROMISE = "P-051"
CLASSES = (64, 36)
EXPECT = "no loop, no local socket, no scheme but http"
SHAPE = "any"
LIFTED_BY = ("egress.private",)


LINES = (
    "CONNECT 127.0.0.1:3128 HTTP/1.1",
    "CONNECT localhost:3128 HTTP/1.1",
    "CONNECT cloister.internal:443 HTTP/1.1",
    "CONNECT cloister.internal:22 HTTP/1.1",
    "CONNECT /run/cloister/box/egress.sock HTTP/1.1",
    "CONNECT unix:/run/docker.sock:80 HTTP/1.1",
    "GET unix:///run/docker.sock:/containers/json HTTP/1.1",
    "GET file:///etc/shadow HTTP/1.1",
    "GET ftp://127.0.0.1/ HTTP/1.1",
    "GET gopher://127.0.0.1:25/ HTTP/1.1",
    "GET http://127.0.0.1:3128/ HTTP/1.1",
    "GET http://[::1]:3128/ HTTP/1.1",
    "CONNECT :443 HTTP/1.1",
    "CONNECT 443 HTTP/1.1",
    "CONNECT * HTTP/1.1",
    "OPTIONS * HTTP/1.1",
    "TRACE http://127.0.0.1/ HTTP/1.1",
    "GET http:///etc/shadow HTTP/1.1",
    "GET //127.0.0.1/ HTTP/1.1",
)


def attack(box: Box) -> None:
    """Odd targets of requests."""
    for line in LINES:
        box.proxy_refuses(
            line.removesuffix(" HTTP/1.1"),
            f"{line}\r\nHost: cloister-prove.example\r\nConnection: close\r\n\r\n".encode(),
        )
