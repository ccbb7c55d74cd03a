"""Asking `cloister-hostd` to end what the system's broker has no power over: units, their mounts and records."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Any

import msgspec

from cloister.errors import RetryError
from cloister.host.frames import Frame, encode_list
from cloister.plan.unit import HOSTD_SOCKET
from cloister.runs.links import Connect

_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
ANSWER_S = 60.0
"""Stopping a unit may take its whole TimeoutStopSec=, and undoing is behind that."""


class Hostd:
    """Root's daemon, as the system's broker asks it: one connection per question."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connect: Connect, path: str = HOSTD_SOCKET) -> None:
        """Ask nobody yet."""
        self._loop, self._connect, self._path = loop, connect, path

    async def end(self, run: str) -> dict[str, Any]:
        """Have a run's unit stopped and everything undone; return what systemd says of its end.

        Raises:
            RetryError: nobody answered in time; hostd undoes it by itself, when it starts next.
        """
        for pause in _PAUSES_S:
            try:
                answer = await self._ask({"verb": "end", "run": run})
                break
            except RetryError:  # such as while the child that made the unit still holds its lock
                await asyncio.sleep(pause)
        else:
            answer = await self._ask({"verb": "end", "run": run})
        ended = answer.get("ended")
        return ended if isinstance(ended, dict) else {}

    async def recover(self, living: tuple[str, ...] = ()) -> list[str]:
        """Have every run undone that is not among `living`; return which.

        Raises:
            RetryError: nobody answered in time.
        """
        undone = (await self._ask({"verb": "recover", "living": ",".join(living)})).get("undone")
        return [str(run) for run in undone] if isinstance(undone, list) else []

    async def _ask(self, fields: dict[str, str]) -> dict[str, Any]:
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()

        def on_frame(_: Any, frame: Frame) -> None:
            for descriptor in frame.descriptors:
                os.close(descriptor)
            if answer.done():
                return
            if frame.kind == "J":
                try:
                    answer.set_result(msgspec.json.decode(frame.payload, type=dict[str, Any]))
                except msgspec.DecodeError as error:
                    answer.set_exception(_failed(f"it said what is not understood: {error}"))
            else:
                answer.set_exception(_failed(frame.payload[1:].decode("utf-8", "replace")))

        def on_close(_: Any) -> None:
            if not answer.done():
                answer.set_exception(_failed("it went away"))

        link = self._connect(self._open(), on_frame, on_close)
        link.send("L", encode_list([f"{name}={value}".encode() for name, value in fields.items()]))
        try:
            return await asyncio.wait_for(answer, ANSWER_S)
        except TimeoutError:
            raise _failed(f"it did not answer within {ANSWER_S:g} s") from None
        finally:
            link.close()

    def _open(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)  # connect(2) on a Unix socket does not wait, it fails with EAGAIN
        try:
            sock.connect(self._path)
            _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError as error:
            sock.close()
            raise _failed(f"{self._path}: {error.strerror}") from error
        if uid != 0:
            sock.close()
            raise _failed(f"{self._path}: somebody else listens there")
        return sock


def _failed(why: str) -> RetryError:
    return RetryError(
        "hostd-silent", f"cloister-hostd did not end a unit: {why}", remedy="systemctl status cloister-hostd"
    )
