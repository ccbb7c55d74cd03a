"""The frames of a request to hostd, read from a caller who may be hostile: bounded in size, time, number and kind.

What crosses here is either understood completely or refused. The user's part (`U`) is bytes that are handed
on unread: the system's broker judges it. Formats: ARCHITECTURE.md, "Runs under systemd".
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import socket
import stat
import time
from collections.abc import Sequence
from typing import NamedTuple

from cloister.errors import CloisterError, RetryError, UsageError, render
from cloister.host.frames import Channel, Frame, FrameError, decode_list

REQUEST_S = 10.0
_DRAIN_S = 1.0
_FIELDS_SIZE = 64 << 10
_LARGEST = {"L": _FIELDS_SIZE, "U": 4 << 20, "V": 1 << 20, "N": 1 << 20}
_FIELDS = frozenset({"verb", "agent", "profile", "pty", "detach", "json", "replaced", "yes", "run", "brings"})
_CONTROL_FIELDS = frozenset({"verb", "run", "living"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FEWEST = 6
BRINGS = ("carry", "copy", "repository")
"""What descriptors may follow those that every request has; the field `brings` names them, in this order."""
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


class Wire:
    """A connection that is read and written with one end in time."""

    def __init__(self, sock: socket.socket, limit_s: float = REQUEST_S) -> None:
        """Take over a connected socket."""
        self._channel = Channel(sock)
        self._socket = sock
        self._until = time.monotonic() + limit_s

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._channel.fileno()

    def allow(self, seconds: float) -> None:
        """Set a new end in time, counted from now."""
        self._until = time.monotonic() + seconds

    def receive(self) -> Frame:
        """Return the next frame.

        Raises:
            FrameError: the peer broke the protocol or left.
            RetryError: it was too slow.
        """
        while True:
            frame = self._channel.receive()
            if frame is not None:
                return frame
            self._wait(select.POLLIN)

    def send(self, kind: str, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Send a frame, all of it.

        Raises:
            FrameError: the peer is gone.
            RetryError: it does not read.
        """
        self._channel.send(kind, payload, descriptors)
        while not self._channel.flush():
            self._wait(select.POLLOUT)

    def finish(self, error: CloisterError) -> None:
        """Answer with a refusal; a peer that is gone or does not read is no reason to fail."""
        self.refuse(refusal(error))

    def refuse(self, payload: bytes) -> None:
        """Send an `F`, and take in for a moment what the peer still sends, so that no write fails before it reads."""
        with contextlib.suppress(FrameError, RetryError, OSError):
            self.send("F", payload)
            until = time.monotonic() + _DRAIN_S
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            while (left := until - time.monotonic()) > 0 and poll.poll(left * 1000) and self._socket.recv(1 << 16):
                continue

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _wait(self, event: int) -> None:
        left = self._until - time.monotonic()
        poll = select.poll()
        poll.register(self._channel.fileno(), event)
        if left <= 0 or not poll.poll(left * 1000):
            raise RetryError("request-too-slow", "the other side was too slow")


class Request(NamedTuple):
    """A run that somebody asks for. Descriptors are as they came; their kinds were looked at."""

    fields: dict[str, str]
    link: int
    streams: tuple[int, int, int]
    workspace: int
    directory: int
    carry: int
    """-1 where nothing is carried in."""
    copy: int
    """The user's directory for changes that are kept aside; -1 where there is none."""
    repository: int
    """The git directory of a workspace that has it elsewhere; -1 where there is none."""
    part: bytes
    words: bytes
    environment: bytes


def refusal(error: CloisterError) -> bytes:
    """Return the payload of `F`: exit code and text."""
    return bytes([error.exit_code]) + render(error).encode("utf-8", "replace")


def read_fields(frame: Frame, allowed: frozenset[str]) -> dict[str, str]:
    """Return the fields of an `L`.

    Raises:
        UsageError: it is not one, or has a field that does not belong there.
    """
    if frame.kind != "L" or len(frame.payload) > _LARGEST["L"]:
        raise _malformed("a request begins with its fields")
    items, end = decode_list(frame.payload)
    fields: dict[str, str] = {}
    for item in items:
        name, separator, value = item.decode("utf-8", "replace").partition("=")
        if not separator or name in fields or name not in allowed or "\0" in value:
            raise _malformed(f"a request has no field {name[:32]!r} here")
        fields[name] = value
    if end != len(frame.payload):
        raise _malformed("something follows the fields")
    return fields


def is_run(frame: Frame) -> bool:
    """Whether a first frame asks for a run; its descriptors stay open."""
    with contextlib.suppress(FrameError):
        return b"verb=run" in decode_list(frame.payload)[0]
    return False


def read_control(frame: Frame) -> dict[str, str]:
    """Return the fields of a request of the system's broker.

    Raises:
        UsageError: it is malformed, or brings descriptors.
    """
    close_all(frame.descriptors)
    if frame.descriptors:
        raise _malformed("this request takes no descriptors")
    return read_fields(frame, _CONTROL_FIELDS)


def read_request(wire: Wire, first: Frame) -> Request:
    """Return a whole request, of which the first frame was read.

    Raises:
        UsageError: it is malformed.
        FrameError: the peer broke the protocol or left.
        RetryError: it was too slow.
    """
    try:
        fields = _run_fields(first)
        brought = _brought(fields, len(first.descriptors))
        _check_descriptors(first.descriptors, brought)
        parts = _read_parts(wire)
    except BaseException:
        close_all(first.descriptors)
        raise
    link, standard_in, out, errors, workspace, directory, *further = first.descriptors
    came = dict(zip(brought, further, strict=True))
    carry, copy, repository = (came.get(name, -1) for name in BRINGS)
    return Request(
        fields, link, (standard_in, out, errors), workspace, directory, carry, copy, repository,
        parts["U"], parts["V"], parts["N"],
    )  # fmt: skip


def _brought(fields: dict[str, str], count: int) -> tuple[str, ...]:
    """Take the names of further descriptors out of the fields; one that is not named is what is carried in."""
    names = tuple(filter(None, fields.pop("brings", "carry" if count > _FEWEST else "").split(",")))
    if names != tuple(name for name in BRINGS if name in names):
        raise _malformed("a request brings nothing else, and in one order")
    return names


def _read_parts(wire: Wire) -> dict[str, bytes]:
    """Return what follows the fields, by type, in whatever order it comes."""
    parts: dict[str, bytes] = {}
    while len(parts) < len(_LARGEST) - 1:
        frame = wire.receive()
        close_all(frame.descriptors)
        known = frame.kind in _LARGEST and frame.kind != "L" and frame.kind not in parts
        if not known or frame.descriptors or len(frame.payload) > _LARGEST[frame.kind]:
            raise _malformed(f"a frame {frame.kind!r} does not belong there, or is too long")
        if frame.kind != "U":
            _check_list(frame)
        parts[frame.kind] = frame.payload
    return parts


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that nobody wants."""
    for descriptor in descriptors:
        os.close(descriptor)


def _run_fields(frame: Frame) -> dict[str, str]:
    fields = read_fields(frame, _FIELDS)
    if fields.get("verb") != "run" or not _NAME.fullmatch(fields.get("agent", "")):
        raise _malformed("a request names the verb run, and an agent")
    if fields.get("profile") and not _NAME.fullmatch(fields["profile"]):
        raise _malformed("a profile has no such name")
    return fields


def _check_list(frame: Frame) -> None:
    items, end = decode_list(frame.payload)
    if end != len(frame.payload) or any(b"\0" in item for item in items):
        raise _malformed(f"the list of frame {frame.kind!r} is malformed")
    if frame.kind == "N" and any(b"=" not in item for item in items):
        raise _malformed("an environment has names and values")


def _check_descriptors(descriptors: tuple[int, ...], brought: tuple[str, ...]) -> None:
    if len(descriptors) != _FEWEST + len(brought):
        raise _malformed(f"{len(descriptors)} descriptors came with a request")
    link, streams, places, further = descriptors[0], descriptors[1:4], descriptors[4:6], descriptors[6:]
    if not _is_stream_socket(link):
        raise _malformed("the link is not a Unix socket")
    for descriptor in streams:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind) or stat.S_ISBLK(kind) or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_PATH:
            raise _malformed("a standard stream cannot be read or written")
    if not all(stat.S_ISDIR(os.fstat(descriptor).st_mode) for descriptor in places):
        raise _malformed("workspace and directory are not directories")
    for name, descriptor in zip(brought, further, strict=True):
        if name == "carry" and not _is_sealed(descriptor):
            raise _malformed("what is carried in is not a sealed memfd")
        if name != "carry" and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise _malformed(f"the {name} is not a directory")


def _is_stream_socket(descriptor: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        return (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM)


def _is_sealed(descriptor: int) -> bool:
    """Whether it is a memory file that nobody can change: reading it never waits, and gives the same bytes twice."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


def _malformed(message: str) -> UsageError:
    return UsageError("request-malformed", message)
