"""A monitor for tests of templates: it says what QEMU says and boots nothing. Standard library only.

`python fake_monitor.py MODE SECONDS`: after that time its guest says hello. Descriptors are those of a template's
maker: 10 the memory, 12 the control socket, 20 the channel.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time

MEMORY, ORDERS, CHANNEL = 10, 12, 20


def main(mode: str, seconds: float) -> None:
    """Play the part."""
    time.sleep(seconds)
    os.pwrite(MEMORY, b"guest memory" * 1000, 1 << 20)
    os.pwrite(MEMORY, b"end", (64 << 20) - 3)
    channel = socket.socket(fileno=CHANNEL)
    head = channel.recv(5, socket.MSG_WAITALL)
    joined = channel.recv(struct.unpack("<I", head[:4])[0], socket.MSG_WAITALL)
    if mode == "silent":
        os.write(1, b"the guest is stuck\n")
        time.sleep(600)
    if mode == "stranger":
        joined = joined[:4] + bytes(16)
    words = [b"kernel=6.1", b"agent=1"]
    payload = joined + struct.pack("<I", len(words)) + b"".join(struct.pack("<I", len(w)) + w for w in words)
    channel.sendall(struct.pack("<IB", len(payload), ord("X" if mode == "odd" else "H")) + payload)
    obey(mode)


def obey(mode: str) -> None:
    """Answer commands until the other side is gone."""
    orders = socket.socket(fileno=ORDERS)
    orders.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
    rest, passed = b"", []
    while True:
        data, fds, _, _ = socket.recv_fds(orders, 65536, 4)
        if not data:
            return
        passed += fds
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            answer = one(mode, json.loads(line)["execute"], passed)
            orders.sendall(b'{"event": "NOISE"}\r\n' + json.dumps(answer).encode() + b"\r\n")


def one(mode: str, command: str, passed: list[int]) -> dict[str, object]:
    """Answer one command."""
    if mode == "refuses" and command == "migrate":
        return {"error": {"class": "GenericError", "desc": "no \x1b[31mroom"}}
    if mode == "hangs" and command == "migrate":
        time.sleep(600)
    if command == "migrate":
        os.write(passed[-1], b"state of devices" * 100)
    if command == "query-migrate":
        return {"return": {"status": "completed"}}
    return {"return": {}}


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
