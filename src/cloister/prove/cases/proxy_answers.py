"""Ask the proxy for a host that no rule allows."""

import time

from cloister.prove.inside.support import Box

ID = "proxy-answers"
TITLE = "Ask the proxy for a host that no rule allows"
PROMISE = "P-048"
CLASSES = (49, 58)
EXPECT = "an immediate, structured answer; the name is not resolved"
SHAPE = "any"
LIFTED_BY = ("egress.mode = learn", "egress.mode = internet")


def attack(box: Box) -> None:
    """By tunnel, plain request and SOCKS; dns-failed as the reason would mean that it was asked for."""
    started = time.monotonic()
    for name in ("data.cloister-prove.example", "cloister-prove.invalid"):
        box.proxy_refuses(f"CONNECT {name}", f"CONNECT {name}:443 HTTP/1.1\r\nHost: {name}:443\r\n\r\n".encode())
        box.proxy_refuses(f"GET {name}", f"GET http://{name}/ HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        box.socks(f"SOCKS {name}", b"\x03" + bytes([len(name)]) + name.encode(), 443)
    answer = box.http(b"CONNECT data.cloister-prove.example:443 HTTP/1.1\r\nHost: x\r\n\r\n")
    box.must(b"x-cloister-reason" in answer.lower(), "structured: a reason in the answer")
    box.must(time.monotonic() - started < 5.0, f"at once: {time.monotonic() - started:.1f} s")


def twin(box: Box) -> None:
    """The page that lists what is allowed is there."""
    answer = box.http(b"GET http://cloister.internal/ HTTP/1.1\r\nHost: cloister.internal\r\nConnection: close\r\n\r\n")
    box.works(f"cloister.internal: {answer[:80]!r}", answer.startswith(b"HTTP/1.1 200"))
