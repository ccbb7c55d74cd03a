"""A client of Firecracker's API: HTTP over the Unix socket in a run's directory.

The monitor is not trusted: it may have been taken over by its guest. Its socket is opened without following a link, it
must be a socket of ours, every answer is bounded in bytes and time, and nothing of an answer is believed beyond its
status. What is asked is `isolation/firecracker.py`; when, `runs/vm_firecracker.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import msgspec

from cloister.errors import CloisterError, StepError

APPEARS_S = 20.0
"""How long a started Firecracker may take to listen: milliseconds, but a loaded machine is slow."""
ANSWERS_S = 15.0
STARTS_S = 60.0
"""For the calls that read a whole guest, or start one."""
KEEPS_S = 120.0
"""For the one that writes a whole guest to a disk."""
MAX_ANSWER = 256 * 1024
MAX_MESSAGE = 400
_POLL_S = 0.01
_NOT_DONE = 300
_SLOW = {"/actions": STARTS_S, "/snapshot/load": STARTS_S, "/snapshot/create": KEEPS_S}
_CREDENTIALS = struct.Struct("iII")


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: bytes


class _Fault(msgspec.Struct, frozen=True):
    fault_message: str = ""


class _VersionAnswer(msgspec.Struct, frozen=True):
    firecracker_version: str


class _Instance(msgspec.Struct, frozen=True):
    state: str


class _BalloonAnswer(msgspec.Struct, frozen=True):
    amount_mib: int


class FirecrackerApi:
    """The API of one Firecracker process. Each call is a connection of its own, so none is ever out of step."""

    def __init__(self, path: str, *, owner: int | None = None) -> None:
        """Remember where it will listen; nothing is opened yet.

        Args:
            path: of the socket, on the host.
            owner: the uid that the process behind it must have; by default ours.
        """
        self._path = path
        self._owner = os.geteuid() if owner is None else owner

    async def appear(self, timeout_s: float = APPEARS_S) -> None:
        """Wait until it listens.

        Raises:
            StepError: it does not within the time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._listens():  # noqa: ASYNC110  (another process makes the socket)
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise _silent(f"did not listen within {timeout_s:g} s") from None

    async def version(self) -> str:
        """Return what it calls its version; it may be anything."""
        return str(await self._field("/version", _VersionAnswer, "firecracker_version"))

    async def state(self) -> str:
        """Return `Not started`, `Running` or `Paused`; it may be anything."""
        return str(await self._field("/", _Instance, "state"))

    async def balloon(self) -> int:
        """Return how many MiB its balloon shall take; it may be any number."""
        return int(await self._field("/balloon", _BalloonAnswer, "amount_mib"))

    async def call(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Ask for something, and return its answer.

        Raises:
            StepError: it refused, is gone, says nothing in time, or something that is no HTTP.
        """
        timeout_s = _SLOW.get(path, ANSWERS_S)
        try:
            async with asyncio.timeout(timeout_s), self._connected() as (reader, writer):
                writer.write(_head(method, path, len(body)) + body)
                await writer.drain()
                answer = await _read_answer(reader)
        except TimeoutError:
            raise _silent(f"did not answer {method} {path} within {timeout_s:g} s") from None
        except (OSError, EOFError, ValueError) as error:
            raise _silent(f"broke off {method} {path}: {str(error) or type(error).__name__}") from None
        if answer.status >= _NOT_DONE:
            raise StepError("firecracker-refused", f"firecracker refused {method} {path}: {_fault(answer)}")
        return answer

    async def _field(self, path: str, shape: type[msgspec.Struct], field: str) -> Any:
        """Ask for one word or number."""
        answer = await self.call("GET", path)
        try:
            return getattr(msgspec.json.decode(answer.body, type=shape), field)
        except msgspec.MsgspecError:
            raise _silent(f"answered GET {path} with something else") from None

    async def _listens(self) -> bool:
        try:
            async with self._connected():
                return True
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as error:
            raise _silent(f"has a socket that cannot be used: {error}") from None

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Connect to exactly this socket: not through a link, which would lead us to another program's."""
        number = os.open(self._path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(number)
            if not stat.S_ISSOCK(found.st_mode):
                raise OSError("it is no socket")
            # By the descriptor: a path in a run's directory may be longer than sun_path (unix(7)).
            reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{number}", limit=MAX_ANSWER)
        finally:
            os.close(number)
        try:
            peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(peer)[1] != self._owner:
                raise OSError("another user listens there")
            yield reader, writer
        finally:
            writer.transport.abort()


def _head(method: str, path: str, length: int) -> bytes:
    """Write the head of a request, as Firecracker's own small HTTP server wants it."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Accept: application/json"]
    if length:
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


async def _read_answer(reader: asyncio.StreamReader) -> Answer:
    """Read one answer.

    Raises:
        ValueError: it is no HTTP/1.1 answer, or too long.
    """
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise ValueError("its answer has no end") from None
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or words[0] not in {"HTTP/1.1", "HTTP/1.0"} or not _is_number(words[1], 3):  # noqa: PLR2004
            raise ValueError("its answer is no HTTP")
        if words[1] != "100":
            break
    length = 0
    for line in lines:
        field, _, value = line.partition(":")
        if field.strip().lower() == "content-length":
            if not _is_number(value.strip(), 9) or int(value) > MAX_ANSWER:
                raise ValueError("its answer has no length that can be")
            length = int(value)
    return Answer(int(words[1]), await reader.readexactly(length))


def _is_number(text: str, digits: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= digits


def _fault(answer: Answer) -> str:
    """Return its reason, or what can be said without one."""
    try:
        message = msgspec.json.decode(answer.body, type=_Fault).fault_message
    except msgspec.MsgspecError:
        message = ""
    text = " ".join(message.split())[:MAX_MESSAGE].rstrip(".")
    return text or f"status {answer.status}, without a reason"


def _silent(what: str) -> CloisterError:
    return StepError("firecracker-silent", f"firecracker {what}", remedy="cloister logs RUN   # what it said last")
