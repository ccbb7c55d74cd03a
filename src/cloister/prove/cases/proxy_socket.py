"""Replace the proxy's socket, or speak to the broker past it."""

import os
import socket

from cloister.prove.inside.support import Box

ID = "proxy-socket"
TITLE = "Replace the proxy's socket, or speak to the broker past it"
PROMISE = "P-047"
CLASSES = (63, 86, 69)
EXPECT = "the socket's directory is read-only, and the broker's own socket is not inside"
SHAPE = "any"


SOCKET = "/run/cloister/box/egress.sock"


def attack(box: Box) -> None:
    """Remove it, bind another, connect to the broker by its path, send it the broker's frames."""
    box.refused("remove", "EROFS EBUSY EACCES", os.unlink, SOCKET)
    box.refused("replace", "EROFS EBUSY EACCES ENOENT EXDEV", os.rename, SOCKET, f"{SOCKET}.old")
    box.refused("bind beside it", "EROFS EACCES EADDRINUSE", bind, "/run/cloister/box/evil.sock")
    box.connects("the broker", "ENOENT EACCES", socket.AF_UNIX, socket.SOCK_STREAM, str(box.fact("broker_socket")))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(2)
        sock.connect(SOCKET)
        frame = b"\x01\x00\x00\x00verb=run"
        sock.sendall(len(frame).to_bytes(4, "little") + b"L" + frame)
        try:
            answer = sock.recv(64)
        except (TimeoutError, ConnectionError):
            answer = b""
    box.must(
        answer[4:5] not in (b"B", b"J", b"F") or answer.startswith((b"HTTP", b"\x05")),
        f"the broker's frames: {answer[:12]!r}",
    )


def bind(path: str) -> None:
    """Bind a socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
