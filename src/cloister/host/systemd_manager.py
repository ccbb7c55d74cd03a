"""Asking a systemd manager for a scope, over its private D-Bus socket: two methods, no library, nothing started.

The user's own manager (for root: the system's) may move a process of the user from a login
session into its part of the cgroup tree, which nobody else without privileges can; it asks the
system's manager for that (`AttachProcessesToUnit`). This is what `systemd-run --user --scope`
does. Calls block, with a time limit. What goes into a scope is for `limits` to say.

Sources: D-Bus Specification (message format, SASL EXTERNAL), org.freedesktop.systemd1(5).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

TIMEOUT_S = 5.0
NO_SUCH_UNIT = "org.freedesktop.systemd1.NoSuchUnit"
_CALL, ANSWER, ERROR, SIGNAL = 1, 2, 3, 4
_PATH, _INTERFACE, MEMBER, _ERROR_NAME, REPLY_SERIAL, _DESTINATION, _SIGNATURE, _UNIX_FDS = 1, 2, 3, 4, 5, 6, 8, 9
_OWN = ("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
_MAX_MESSAGE = 1 << 20
_MAX_GREETING = 1024
_SHORTEST_S = 0.001
_AT_ONCE = 1 << 16

Value = tuple[str, int | str | tuple[int, ...]]
"""A D-Bus type (one of s, b, i, u, t, au) and a value of it."""


class ManagerError(Exception):
    """No manager, no answer in time, or a refusal; `name` is that of the D-Bus error, where there is one."""

    def __init__(self, name: str, message: str) -> None:
        """Keep both parts."""
        super().__init__(message)
        self.name = name


class Message(NamedTuple):
    """A message that came in."""

    kind: int
    fields: dict[int, str | int]
    body: bytes


def private_socket(uid: int) -> str:
    """Return where the manager of this user listens."""
    return f"/run/user/{uid}/systemd/private" if uid else "/run/systemd/private"


class Manager:
    """A connection to the manager of the user we are. Use it in a `with` block."""

    passes_descriptors = False
    """Whether calls may carry descriptors (D-Bus Specification, "NEGOTIATE_UNIX_FD")."""

    def __init__(self, path: str = "", timeout_s: float = TIMEOUT_S) -> None:
        """Connect to `path`, by default our manager's socket, and say who we are; all calls share the time limit.

        Raises:
            ManagerError: it is not there, or does not want us.
        """
        self.serial = 0
        self._arrived = bytearray()
        self._awaited: tuple[bytes, ...] = ()
        """How lines of the greeting begin that were not heard yet."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._until = time.monotonic() + timeout_s
        self._socket.settimeout(timeout_s)
        with self.in_words():
            self._socket.connect(path or private_socket(os.geteuid()))
            self._greet()

    def hear_greeting(self) -> None:
        """Hear that the manager wants us, before anything is asked; it takes its time, in which others can be done.

        Raises:
            ManagerError: it does not.
        """
        awaited, self._awaited = self._awaited, ()
        with self.in_words():
            for start in awaited:
                self._expect(start)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def start_scope(self, unit: str, pid: int, properties: dict[str, Value]) -> None:
        """Make the transient scope `unit` around process `pid`; return when the manager says it is done.

        Raises:
            ManagerError: there is no such scope now.
        """
        body = Writer()
        body.string(unit)
        body.string("fail")  # never instead of one that exists
        with body.array():
            for name, value in {**properties, "PIDs": ("au", (pid,))}.items():
                body.align(8)
                body.string(name)
                body.variant(value)
        with body.array():
            pass  # no auxiliary units
        with self.in_words():
            job = read_string(self.call("StartTransientUnit", "ssa(sv)a(sa(sv))", body.data).body, 0)[0]
            self._await_job(job)

    def stop(self, unit: str) -> None:
        """Have `unit` ended, and all that is in it; one that is not there is fine.

        Raises:
            ManagerError: the manager refuses for another reason.
        """
        body = Writer()
        body.string(unit)
        body.string("replace")
        try:
            with self.in_words():
                self.call("StopUnit", "ss", body.data)
        except ManagerError as error:
            if error.name != NO_SUCH_UNIT:
                raise

    def _greet(self) -> None:
        """Authenticate as the uid the kernel tells the manager anyway (SASL EXTERNAL); all lines at once."""
        name = str(os.geteuid()).encode().hex()
        more = "NEGOTIATE_UNIX_FD\r\n" if self.passes_descriptors else ""
        self._socket.sendall(f"\0AUTH EXTERNAL {name}\r\n{more}BEGIN\r\n".encode())
        self._awaited = (b"OK ", b"AGREE_UNIX_FD") if more else (b"OK ",)

    def _expect(self, start: bytes) -> None:
        line = b""
        while not line.endswith(b"\r\n"):  # one by one: what follows may be a message already
            line += self._receive(1)
            if len(line) > _MAX_GREETING:
                raise ManagerError("", "the manager's greeting has no end")
        if not line.startswith(start):
            raise ManagerError("", f"the manager does not want us: {line.decode('ascii', 'replace').strip()}")

    def call(self, member: str, signature: str, body: bytearray) -> Message:
        """Call a method of the manager and return its answer.

        Raises:
            ManagerError: it refuses.
        """
        self.send(self.marshal(member, signature, body))
        while True:
            message = self.next()
            if message.kind in (ANSWER, ERROR) and message.fields.get(REPLY_SERIAL) == self.serial:
                break
        if message.kind == ERROR:
            raise error_of(message)
        return message

    def marshal(
        self, member: str, signature: str, body: bytearray, whose: tuple[str, str] = _OWN, descriptors: int = 0
    ) -> bytearray:
        """Return a call as bytes, of an object and interface, for so many descriptors.

        Its answer will carry `serial` as it is now.
        """
        self.serial += 1
        header = Writer()
        header.data += struct.pack("<cBBBII", b"l", _CALL, 0, 1, len(body), self.serial)
        with header.array():
            for field, kind, text in (
                (_PATH, "o", whose[0]),
                (_INTERFACE, "s", whose[1]),
                (MEMBER, "s", member),
                (_DESTINATION, "s", "org.freedesktop.systemd1"),
                (_SIGNATURE, "g", signature),
            ):
                header.align(8)
                header.data.append(field)
                header.variant((kind, text))
            if descriptors:
                header.align(8)
                header.data.append(_UNIX_FDS)
                header.variant(("u", descriptors))
        header.align(8)
        return header.data + body

    def send(self, calls: bytearray, descriptors: tuple[int, ...] = ()) -> None:
        """Send one call or several; descriptors travel with the first byte."""
        self.hear_greeting()
        sent = socket.send_fds(self._socket, [calls], descriptors) if descriptors else 0
        self._socket.sendall(calls[sent:])

    def _await_job(self, job: str) -> None:
        """Wait for the end of a job; on this socket the manager tells of all of them, unasked."""
        while True:
            message = self.next()
            if message.kind != SIGNAL or message.fields.get(MEMBER) != "JobRemoved":
                continue
            path, offset = read_string(message.body, 4)
            if path != job:
                continue
            _, offset = read_string(message.body, offset)
            result, _ = read_string(message.body, offset)
            if result != "done":
                raise ManagerError("", f"the scope's job ended as {result!r}")
            return

    def next(self) -> Message:
        """Return the next message, whatever it is; call it inside of `in_words`."""
        head = self._receive(16)
        order, kind, _, _, length, _, fields_length = struct.unpack("<cBBBIII", head)
        if order != b"l" or length + fields_length > _MAX_MESSAGE:
            raise ManagerError("", "the manager's answer is not understood")
        fields = self._receive(-(-fields_length // 8) * 8)[:fields_length]
        return Message(kind, dict(_fields(fields)), self._receive(length))

    def _receive(self, size: int) -> bytes:
        while len(self._arrived) < size:
            # One limit for all: a manager that talks of other things without end must not hold us.
            self._socket.settimeout(max(self._until - time.monotonic(), _SHORTEST_S))
            part = self._socket.recv(_AT_ONCE)
            if time.monotonic() > self._until:
                raise TimeoutError("timed out")
            if not part:
                raise ManagerError("", "the manager closed the connection")
            self._arrived += part
        data = bytes(self._arrived[:size])
        del self._arrived[:size]
        return data

    @contextlib.contextmanager
    def in_words(self) -> Iterator[None]:
        """Turn what the socket or a malformed message raises into our error; close the connection then."""
        try:
            yield
        except ManagerError:
            self._socket.close()
            raise
        except (OSError, struct.error, IndexError, UnicodeDecodeError) as error:
            self._socket.close()
            raise ManagerError("", f"no answer from the systemd manager: {error}") from error


class Writer:
    """Marshals values, little endian (D-Bus Specification, "Marshaling")."""

    def __init__(self) -> None:
        """Start empty."""
        self.data = bytearray()

    def align(self, size: int) -> None:
        """Pad to a multiple of `size`."""
        self.data += bytes(-len(self.data) % size)

    def number(self, code: str, value: int) -> None:
        """Write a number as struct(3) packs it, aligned to its own size."""
        packed = struct.pack(f"<{code}", value)
        self.align(len(packed))
        self.data += packed

    def string(self, text: str) -> None:
        """Write a string or object path."""
        encoded = text.encode()
        self.number("I", len(encoded))
        self.data += encoded + b"\0"

    @contextlib.contextmanager
    def array(self) -> Iterator[None]:
        """Write an array of structs; its items are written inside the block."""
        self.number("I", 0)
        place = len(self.data)
        self.align(8)
        start = len(self.data)
        yield
        self.data[place - 4 : place] = struct.pack("<I", len(self.data) - start)

    def variant(self, typed: Value) -> None:
        """Write a value with its type."""
        kind, value = typed
        self.data += bytes([len(kind)]) + kind.encode() + b"\0"
        if isinstance(value, tuple):
            self.number("I", 4 * len(value))
            for item in value:
                self.number("I", item)
        elif isinstance(value, int):
            self.number({"b": "I", "i": "i", "u": "I", "t": "Q"}[kind], value)
        elif kind == "g":
            self.data += bytes([len(value)]) + value.encode() + b"\0"
        else:
            self.string(value)


def error_of(message: Message) -> ManagerError:
    """Return what a message of the kind `ERROR` says."""
    return ManagerError(str(message.fields.get(_ERROR_NAME, "")), read_string(message.body, 0)[0])


def read_string(data: bytes, offset: int) -> tuple[str, int]:
    """Return the string at `offset`, aligned, and where the next value begins."""
    offset += -offset % 4
    (length,) = struct.unpack_from("<I", data, offset)
    start = offset + 4
    if start + length >= len(data):
        raise IndexError("a string runs over the end of its message")
    return data[start : start + length].decode(), start + length + 1


def _fields(data: bytes) -> Iterator[tuple[int, str | int]]:
    """Yield the header fields of a message: number and value."""
    offset = 0
    while offset < len(data):
        code, kind = data[offset], chr(data[offset + 2])
        offset += 4  # field, length of the signature, one letter, NUL
        if kind in "so":
            value, offset = read_string(data, offset)
            yield code, value
        elif kind == "g":
            length = data[offset]
            yield code, data[offset + 1 : offset + 1 + length].decode()
            offset += length + 2
        elif kind == "u":
            yield code, struct.unpack_from("<I", data, offset)[0]
            offset += 4
        else:
            raise IndexError(f"a header field of type {kind!r}")
        offset += -offset % 8
