"""The words of a caller of root's daemon, for cases that attack it from the user's side of the host.

Runs as the user with the system's Python, outside of any sandbox. It knows the frames of ARCHITECTURE.md, "Runs under
systemd", and nothing of what they may hold: that is the attack. A run that it is given ends with its connection.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Any

from cloister.prove.inside.support import Box

_HEADER = struct.Struct("<IB")
_COUNT = struct.Struct("<I")
LIMIT_S = 15.0


def packed(items: Iterable[bytes]) -> bytes:
    """Return a list as frames hold it."""
    stored = list(items)
    return _COUNT.pack(len(stored)) + b"".join(_COUNT.pack(len(item)) + item for item in stored)


def frame(kind: str, payload: bytes) -> bytes:
    """Return a frame."""
    return _HEADER.pack(len(payload), ord(kind)) + payload


def place(path: str, flags: int = os.O_DIRECTORY) -> int:
    """Open a place as the user's broker does."""
    return os.open(path, os.O_PATH | os.O_CLOEXEC | flags)


def said(connection: socket.socket) -> str:
    """Return what came of a request: `started`, `refused: …`, or `closed`."""
    data, until = b"", time.monotonic() + LIMIT_S
    while (left := until - time.monotonic()) > 0:
        while len(data) >= _HEADER.size and len(data) - _HEADER.size >= (size := _HEADER.unpack_from(data)[0]):
            kind, payload = chr(data[4]), data[_HEADER.size : _HEADER.size + size]
            data = data[_HEADER.size + size :]
            if kind == "F":
                return "refused: " + " ".join(payload[1:].decode("utf-8", "replace").split())[:160]
            answer = json.loads(payload) if kind == "J" else {}
            if "event" not in answer:
                return "started" if "run" in answer else f"answered: {kind} {str(answer)[:80]}"
        connection.settimeout(left)
        try:
            more = connection.recv(1 << 16)
        except (ConnectionError, TimeoutError) as error:
            return f"closed: {error}"
        if not more:
            return "closed"
        data += more
    return "no answer"


def asks(box: Box, workspace: int, inside: int, **changed: Any) -> str:
    """Send a request that is honest but for what is changed; return what came of it.

    Changes: `fields` (more of them, or others), `part` (bytes), `carry` and `link` (descriptors), `streams`.
    """
    fields = {"verb": "run", "agent": str(box.fact("agent")), "replaced": "1", "yes": "1"} | changed.get("fields", {})
    link, kept = socket.socketpair(socket.AF_UNIX)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    streams: Sequence[int] = changed.get("streams", (null, null, null))
    sent = [changed.get("link", link.fileno()), *streams, workspace, inside]
    sent += [changed["carry"]] if "carry" in changed else []
    text = packed(f"{name}={value}".encode("utf-8", "surrogateescape") for name, value in fields.items())
    part = changed.get("part", str(box.fact("unit_part")).encode())
    rest = frame("U", part) + frame("V", packed([b"/usr/bin/true"])) + frame("N", packed([b"TERM=dumb"]))
    try:
        with connected(box) as connection, link, kept:
            first = frame("L", text)
            socket.send_fds(connection, [first[:1]], sent)
            connection.sendall(first[1:] + rest)
            return said(connection)
    except (BrokenPipeError, ConnectionResetError) as error:
        return f"closed: {error}"
    finally:
        os.close(null)


def connected(box: Box) -> socket.socket:
    """Return a connection to root's daemon."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(LIMIT_S)
    connection.connect(str(box.fact("hostd_socket")))
    return connection


def must_be_refused(box: Box, what: str, answer: str) -> None:
    """Record a request that must have come to nothing: words, or a closed connection."""
    box.must(answer.startswith(("refused", "closed")), f"{what}: {answer}")


def must_start(box: Box, what: str = "an honest request") -> None:
    """Insist that the same request without a trick is served, so that each refusal is about its trick.

    Raises:
        RuntimeError: it is not.
    """
    here = place(box.workspace)
    answer = asks(box, here, here)
    os.close(here)
    box.works(f"{what}: {answer}", answer == "started")
    box.stopped(f"{what}: {answer}")
