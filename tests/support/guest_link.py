"""The host's end of the link in a few lines of Python: for tests of what a guest is, not of the link.

It trusts the guest, waits for everything, and answers whoever opens a socket of the box as the relay answers the
self-probe. The real one is the keeper (`shim/keeper.c`).
"""

from __future__ import annotations

import os
import platform
import select
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cloister.host.frames import Frame, decode_list, decode_u32, encode, encode_list, encode_u32
from cloister.host.tar_format import Entry, end, padding
from cloister.host.tar_format import encode as encode_entry
from cloister.host.vm_link import PROTOCOL
from cloister.isolation.inner import BOX, Inner, inner_argv
from cloister.isolation.seccomp import assemble

PATIENCE = 60.0
WINDOW = 1 << 18
TAR = 2
UID = 1000
HOME = "/home/alice"
SHIM = "/run/cloister/shim"
_HEADER = struct.Struct("<IB")
_ANSWER = b"\x05\x00"


class Result(NamedTuple):
    """What a command left: its status as the guest says it, and its output as text."""

    status: int
    out: str
    err: str


def fields(**changes: object) -> list[str]:
    """Return the fields of a run, with fresh randomness and the time; None leaves one out, a tuple repeats it."""
    made: dict[str, object] = {
        "hostname": "box", "machine_id": os.urandom(16).hex(), "user": "alice", "uid": UID, "gid": UID, "home": HOME,
        "workspace": None, "socket": "egress.sock", "entropy": os.urandom(64).hex(), "time_ns": time.time_ns(),
    }  # fmt: skip
    made |= changes
    words: list[str] = []
    for name, value in made.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"{name}={each}" for each in values if each is not None]
    return words


def tar(files: Mapping[str, bytes]) -> bytes:
    """Return the tar of these files, by names without the leading slash."""
    parts: list[bytes] = []
    seen: set[str] = set()
    for name, data in files.items():
        above = name.split("/")[:-1]
        for count in range(1, len(above) + 1):
            parent = "/".join(above[:count])
            if parent not in seen:
                parts.append(encode_entry(Entry(parent, "directory")))
                seen.add(parent)
        parts += [encode_entry(Entry(name, "file", len(data))), data, padding(len(data))]
    return b"".join([*parts, end()])


class GuestLink:
    """One session with one guest."""

    def __init__(self, channel: socket.socket) -> None:
        """Speak on this socket, which stays the caller's."""
        channel.setblocking(True)
        self._channel = channel
        self._arrived = b""
        self._next = 1
        self._output: dict[int, bytearray] = {}
        self._ended: dict[int, int] = {}
        self.probe: tuple[str, ...] = ()

    def join(self) -> dict[str, str]:
        """Say `J`; return the words of the guest's `H`."""
        nonce = os.urandom(16)
        self.send("J", encode_u32(PROTOCOL) + nonce)
        while True:
            frame = self.receive()
            if frame.kind == "H" and frame.payload[4:20] == nonce:
                words, _ = decode_list(frame.payload, 20)
                return dict(word.decode().split("=", 1) for word in words)

    def begin(self, words: Iterable[str], files: Mapping[str, bytes] | None = None) -> None:
        """Begin a run with these fields and files, and start a command 0 that waits for the end of its input.

        Raises:
            AssertionError: the guest refused, or its self-probe failed.
        """
        self.begin_only(words, files)
        frame = self.wait("P")
        self.probe = tuple(word.decode() for word in decode_list(frame.payload)[0])
        assert "verdict=passed" in self.probe, self.probe
        self.send("G", _order(("cat",)))
        self.wait("R")

    def begin_only(self, words: Iterable[str], files: Mapping[str, bytes] | None = None) -> None:
        """Send `B` and the tar, and no more."""
        self.send("B", self.begin_frame(words))
        whole = tar({f"{BOX[1:]}/seccomp.bpf": assemble(platform.machine()), **(files or {})})
        for at in range(0, len(whole), 1 << 15):
            self.send("D", encode_u32(TAR) + whole[at : at + (1 << 15)])
        self.send("F", encode_u32(TAR))

    def begin_frame(self, words: Iterable[str]) -> bytes:
        """Return the payload of `B`. Without Landlock: what is tested is the guest's own walls."""
        made = Inner(control=0, unit=True, seccomp=f"{BOX}/seccomp.bpf", landlock="off")
        return encode_list(w.encode() for w in words) + encode_list(w.encode() for w in inner_argv(SHIM, made))

    def run(self, *argv: str, seconds: float = PATIENCE) -> Result:
        """Run a command as the agent; return what it left."""
        number = self._next
        self._next += 1
        out, err = (0x80000000 | number << 2 | k for k in (1, 2))
        self._output[out], self._output[err] = bytearray(), bytearray()
        self.send("X", encode_u32(number) + _order(argv))
        self.send("F", encode_u32(0x80000000 | number << 2))
        until = time.monotonic() + seconds
        while number not in self._ended:
            self.take(self.receive(until))
        return Result(self._ended[number], self._output[out].decode(errors="replace"),
                      self._output[err].decode(errors="replace"))  # fmt: skip

    def shell(self, script: str, seconds: float = PATIENCE) -> Result:
        """Run a script with sh(1) as the agent."""
        return self.run("sh", "-c", script, seconds=seconds)

    def finish(self) -> int:
        """End command 0; return its status, which the guest says when its disks are clean."""
        self.send("F", encode_u32(0x80000000))
        return self.wait("E").payload[4]

    def send(self, kind: str, payload: bytes) -> None:
        """Send one frame."""
        self._channel.sendall(encode(kind, payload))

    def wait(self, kind: str, seconds: float = PATIENCE) -> Frame:
        """Take frames until one of this kind has come."""
        until = time.monotonic() + seconds
        while True:
            frame = self.receive(until)
            if frame.kind == kind:
                return frame
            self.take(frame)

    def take(self, frame: Frame) -> None:
        """Do what a frame asks for.

        Raises:
            AssertionError: the guest gave up.
        """
        number = decode_u32(frame.payload)[0] if len(frame.payload) >= 4 else 0
        if frame.kind == "D":
            self.send("C", encode_u32(number) + encode_u32(len(frame.payload) - 4))
            if number in self._output:
                self._output[number] += frame.payload[4:]
            elif number & 0x80000000 == 0:
                self.send("D", encode_u32(number) + _ANSWER)
        elif frame.kind == "O":
            self.send("C", encode_u32(number) + encode_u32(WINDOW))
        elif frame.kind == "E":
            self._ended[number] = frame.payload[4]
        elif frame.kind == "Y":
            raise AssertionError(f"the guest gave up: {frame.payload!r}")

    def receive(self, until: float | None = None) -> Frame:
        """Return the next frame.

        Raises:
            AssertionError: it did not come in time.
        """
        until = time.monotonic() + PATIENCE if until is None else until
        while True:
            if len(self._arrived) >= _HEADER.size:
                length, kind = _HEADER.unpack_from(self._arrived)
                if len(self._arrived) >= _HEADER.size + length:
                    payload = self._arrived[_HEADER.size : _HEADER.size + length]
                    self._arrived = self._arrived[_HEADER.size + length :]
                    return Frame(chr(kind), payload)
            left = until - time.monotonic()
            heard = left > 0 and select.select([self._channel], [], [], left)[0]
            assert heard, "the guest is silent"
            data = self._channel.recv(1 << 16)
            assert data, "the guest has gone"
            self._arrived += data


def _order(argv: tuple[str, ...]) -> bytes:
    environment = [b"PATH=/usr/local/bin:/usr/bin:/bin", f"HOME={HOME}".encode(), b"LANG=C.UTF-8"]
    return encode_u32(0) + encode_list(w.encode() for w in argv) + encode_list(environment) + encode_list([b"/"])
