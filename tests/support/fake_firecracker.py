"""A Firecracker for tests of templates and of kept machines that boots nothing, and may be its guest's.

`python fake_firecracker.py MODE DIRECTORY`: its sockets lie there, as in the jail of a template's maker; 10 is the
memory's descriptor, 11 the state's. What it does besides its part is its mode's name. The one that judges requests is
`support.firecracker_alike`. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path

MEMORY, STATE = 10, 11
WRITTEN = b"state of devices" * 100
BYTES = 64 << 20


def main(mode: str, directory: Path) -> None:
    """Play the part."""
    os.chdir(directory)  # a path may be longer than sun_path (unix(7))
    vsock = socket.socket(socket.AF_UNIX)
    if mode == "link":
        Path("vsock.sock").symlink_to(directory.parent.parent.parent / "another.sock")
    elif mode == "file":
        Path("vsock.sock").write_text("no socket")
    else:
        vsock.bind("vsock.sock")
        vsock.listen()
        threading.Thread(target=guest, args=(mode, vsock), daemon=True).start()
    server = socket.socket(socket.AF_UNIX)
    server.bind("api.sock")
    if mode == "deep":
        for _ in range(1500):
            os.mkdir("deeper")
            os.chdir("deeper")
        Path("locked").mkdir(0)
    server.listen()
    while True:
        client, _ = server.accept()
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head and (more := client.recv(65536)):
                head += more
            if head:
                client.sendall(answer(mode, head.split(b" ")[1].decode(), head.partition(b"\r\n\r\n")[2]))


def answer(mode: str, path: str, body: bytes) -> bytes:
    """Do what is asked."""
    if path == "/version":
        version = "1.16.0" if mode == "deaf" else "1.17.0"
        text = json.dumps({"firecracker_version": version}).encode()
        return b"HTTP/1.1 200 \r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)
    if path == "/snapshot/create" and mode == "refuses":
        return b"HTTP/1.1 400 \r\nContent-Length: 0\r\n\r\n"
    if path == "/snapshot/create" and mode != "nothing":
        write(mode)
    if path == "/vm":
        with Path("asked").open("ab") as file:
            file.write(body + b"\n")
    if path == "/snapshot/load":
        good = os.pread(STATE, 1 << 16, 0) == WRITTEN and os.pread(MEMORY, 12, 1 << 20) == b"guest memory"
        if mode == "twin-lost" or not good or json.loads(body)["snapshot_path"] != f"/proc/self/fd/{STATE}":
            text = b'{"fault_message": "the state is not what it was"}'
            return b"HTTP/1.1 400 \r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)
    return b"HTTP/1.1 204 \r\n\r\n"


def write(mode: str) -> None:
    """Write memory and state."""
    os.ftruncate(MEMORY, BYTES)
    os.pwrite(MEMORY, b"guest memory" * 1000, 1 << 20)
    os.pwrite(STATE, WRITTEN, 0)
    if mode == "grown":
        os.ftruncate(MEMORY, 1 << 40)
    if mode == "short":
        os.ftruncate(MEMORY, BYTES - 1)
    if mode == "links":
        for name in ("memory", "state", "memory.out"):
            Path(name).symlink_to("../another")
    if mode == "endless":
        os.ftruncate(STATE, 1 << 40)
    if mode == "empty":
        os.ftruncate(STATE, 0)


def guest(mode: str, server: socket.socket) -> None:
    """Be the guest, behind the vsock's socket."""
    while True:
        client, _ = server.accept()
        threading.Thread(target=talk, args=(mode, client), daemon=True).start()


def talk(mode: str, client: socket.socket) -> None:
    """Answer one caller, as a guest of the template's age."""
    with client, contextlib.suppress(OSError, struct.error):
        assert client.recv(13, socket.MSG_WAITALL) == b"CONNECT 5000\n"
        client.sendall(b"O" * 4096 if mode == "babble" else b"OK 1073741824\n")
        head = client.recv(5, socket.MSG_WAITALL)
        joined = client.recv(struct.unpack("<I", head[:4])[0], socket.MSG_WAITALL)
        if mode == "silent":
            os.write(1, b"the guest is stuck\n")
            time.sleep(600)
        words = [b"kernel=6.2" if mode == "twin-changed" else b"kernel=6.1", b"agent=1"]
        payload = joined + struct.pack("<I", len(words)) + b"".join(struct.pack("<I", len(w)) + w for w in words)
        client.sendall(struct.pack("<I", len(payload)) + b"H" + payload)
        client.recv(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
