"""The sending end of the keeper's socket: frames of JSON lines out, counts of what was written back.

    u32 length · u8 type · payload       little endian, as in "Shim protocol"
    `E` events, one JSON object per line; empty: are you there?    `K` u64: so many `E` frames are in the log
                                                                   `S` a run is to be stopped: JSON (`Sender.orders`)

Blocking, with a time limit; for threads (`runs/audit_door.py`) and for processes of one request (hostd). Also for those
that may import nothing but this room: an event is what `event` makes of plain values.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping

import msgspec

from cloister.plan.unit import AUDIT_SOCKET

AUDIT_UNIT = "/etc/systemd/system/cloister-auditd.socket"
"""Where this file is, the system keeps the log: a keeper that is silent is an outage then, not an absence."""
MOST_BYTES = 1 << 17
"""Of one frame. Keepers take twice as much."""
HEADER = struct.Struct("<IB")
COUNT = struct.Struct("<Q")
_EVENTS, _WRITTEN, _STOP = ord("E"), ord("K"), ord("S")
_MOST_ORDER = 1 << 14
_MOST_ORDERS = 1000
Value = str | int | float | bool


class Sender:
    """One connection to a keeper."""

    def __init__(self, path: str = AUDIT_SOCKET, timeout_s: float = 5.0) -> None:
        """Connect.

        Raises:
            OSError: nobody listens.
        """
        self._timeout_s = timeout_s
        self._sent = self._written = 0
        self._data = b""
        self.orders: list[bytes] = []
        """Runs that the keeper wants stopped, each as JSON; emptied by whoever obeys."""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._sock.settimeout(timeout_s)
            self._sock.connect(path)
        except OSError:
            self._sock.close()
            raise

    def send(self, events: Iterable[bytes] = ()) -> None:
        """Hand over events and wait until they are in the log; without any, ask whether the keeper is well.

        Raises:
            OSError: they may not be, and this connection is of no use any more. Another may send the same events again.
        """
        self._sock.settimeout(self._timeout_s)
        frames = list(_frames(events)) or [HEADER.pack(0, _EVENTS)]
        try:
            for frame in frames:
                self._sock.sendall(frame)
                self._sent += 1
            self._wait()
        except OSError:
            self.close()
            raise

    def look(self) -> None:
        """Take orders that have come; never waits.

        Raises:
            OSError: the keeper closed the connection.
        """
        self._sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self._hear()

    def _wait(self) -> None:
        until = time.monotonic() + self._timeout_s
        while self._written < self._sent:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError("the keeper of the audit log does not answer")
            self._sock.settimeout(left)
            self._hear()

    def _hear(self) -> None:
        """Take what has come, whole frames at a time."""
        more = self._sock.recv(4096)
        if not more:
            raise ConnectionResetError("the keeper of the audit log closed the connection")
        self._data += more
        while len(self._data) >= HEADER.size:
            length, kind = HEADER.unpack_from(self._data)
            if (kind, length) != (_WRITTEN, COUNT.size) and (kind != _STOP or length > _MOST_ORDER):
                raise ConnectionAbortedError("this is no keeper of an audit log")
            end = HEADER.size + length
            if len(self._data) < end:
                return
            payload, self._data = self._data[HEADER.size : end], self._data[end:]
            if kind == _WRITTEN:
                (self._written,) = COUNT.unpack(payload)
            elif len(self.orders) < _MOST_ORDERS:
                self.orders.append(payload)

    def close(self) -> None:
        """Let go."""
        self._sock.close()


def report(event: bytes, timeout_s: float = 5.0) -> str:
    """Have one event written by the system's keeper, where there is one; return why not, or nothing."""
    if not system_keeps():
        return ""
    try:
        sender = Sender(timeout_s=timeout_s)
        try:
            sender.send([event])
        finally:
            sender.close()
    except OSError as error:
        return str(error)
    return ""


def system_keeps() -> bool:
    """Say whether this system has a keeper of its own."""
    return os.path.exists(AUDIT_UNIT) or os.path.exists(AUDIT_SOCKET)


def event(kind: str, source: str, details: Mapping[str, Value], **fields: Value) -> bytes:
    """Return an event (`audit/event.py`) of now, from plain values; empty ones are left out."""
    whole = {"time": time.time_ns(), "kind": kind, **{name: value for name, value in fields.items() if value != ""}}
    return msgspec.json.encode({**whole, "source": source, "id": f"{os.urandom(6).hex()}-1", "details": details})


def _frames(events: Iterable[bytes]) -> Iterable[bytes]:
    portion: list[bytes] = []
    size = 0
    for one in events:
        if size + len(one) >= MOST_BYTES and portion:
            yield HEADER.pack(size, _EVENTS) + b"".join(portion)
            portion, size = [], 0
        portion += (one, b"\n")
        size += len(one) + 1
    if portion:
        yield HEADER.pack(size, _EVENTS) + b"".join(portion)
