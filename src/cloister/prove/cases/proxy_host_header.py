"""Name one host in the request line and another in the Host header."""

from cloister.prove.inside.support import Box

ID = "proxy-host-header"
TITLE = "Name one host in the request line and another in the Host header"
PROMISE = "P-053"
CLASSES = (51, 54)
EXPECT = "the decision and the connection use one name; a mismatch reaches neither"
SHAPE = "any"


def attack(box: Box) -> None:
    """The listener in either place; several Host headers; none."""
    here = f"127.0.0.1:{int(box.fact('tcp_port'))}"
    for target, hosts in (
        (f"http://{here}/", ["cloister.internal"]),
        (f"http://{here}/", ["cloister.internal", here]),
        (f"http://{here}/", []),
        ("/", [here]),
        ("/", []),
        (f"http://{here}/", [here, here]),
    ):
        headers = "".join(f"Host: {host}\r\n" for host in hosts)
        box.proxy_refuses(
            f"{target} with {hosts}", f"GET {target} HTTP/1.1\r\n{headers}Connection: close\r\n\r\n".encode()
        )


def twin(box: Box) -> None:
    """A well-formed request is answered, whatever the answer."""
    answer = box.http(b"GET http://cloister.internal/ HTTP/1.1\r\nHost: cloister.internal\r\nConnection: close\r\n\r\n")
    box.works(f"an answer: {answer[:60]!r}", answer.startswith(b"HTTP/1.1 "))
