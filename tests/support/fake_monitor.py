"""A monitor for tests of templates: it says what QEMU says and boots nothing. Standard library only.

`python fake_monitor.py MODE SECONDS`: after that time its guest says hello. Descriptors are those of a template's
maker: 10 the memory, 12 the control socket, 20 the channel. One that starts from a template has the state as 11: it
says hello when that is what was written; in the mode `changed` as another guest, in the mode `lost` never.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time

MEMORY, STATE, ORDERS, CHANNEL = 10, 11, 12, 20
_WRITTEN = b"state of devices" * 100


def main(mode: str, seconds: float) -> None:
    """Play the part."""
    time.sleep(seconds)
    if mode.startswith("twin"):
        twin(mode)
        return
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
    say_hello(channel, joined, b"X" if mode == "odd" else b"H")
    obey(mode)


def say_hello(channel: socket.socket, joined: bytes, kind: bytes = b"H", kernel: bytes = b"6.1") -> None:
    """Answer as a guest."""
    words = [b"kernel=" + kernel, b"agent=1"]
    payload = joined + struct.pack("<I", len(words)) + b"".join(struct.pack("<I", len(w)) + w for w in words)
    channel.sendall(struct.pack("<I", len(payload)) + kind + payload)


def twin(mode: str) -> None:
    """Go on from a template."""
    orders, channel = socket.socket(fileno=ORDERS), socket.socket(fileno=CHANNEL)
    commands = [json.loads(line)["execute"] for line in orders.recv(65536).splitlines()]
    good = commands[-1] == "migrate-incoming" and os.pread(STATE, 1 << 16, 0) == _WRITTEN
    good = good and os.pread(MEMORY, 12, 1 << 20) == b"guest memory"
    if mode == "twin-lost" or not good:
        os.write(1, b"the state is not what it was\n")
        return
    head = channel.recv(5, socket.MSG_WAITALL)
    joined = channel.recv(struct.unpack("<I", head[:4])[0], socket.MSG_WAITALL)
    say_hello(channel, joined, kernel=b"6.2" if mode == "twin-changed" else b"6.1")
    time.sleep(600)


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
        os.write(passed[-1], _WRITTEN)
    if command == "query-migrate":
        return {"return": {"status": "completed"}}
    return {"return": {}}


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
