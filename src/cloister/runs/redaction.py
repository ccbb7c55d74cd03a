"""Redaction that cannot hold up the event loop: what may take long is done by a process of the run's own.

Patterns of the owner and long bodies go there. It is started with the first body that needs it, and takes one after the
other. What takes too long, or more memory than it may, ends it and refuses that call; the next one gets a new process.
A pattern that backtracks without end costs its own agent calls, and nobody else anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys

import msgspec

from cloister.llm.errors import Refusal
from cloister.llm.redact import Redactor, Wish

MODULE = "cloister.services.redaction"
"""Started by its name: rooms above this one cannot be imported here."""
WAIT_S = 10.0
"""The most time for one body, waiting for those before it included."""
SHORT_BYTES = 256 * 1024
"""Below this, known shapes are looked for at once: they do not backtrack."""
_LENGTH, _BODY, _ANSWER = struct.Struct(">I"), struct.Struct(">Q"), struct.Struct(">QI")


class Redaction:
    """The redactor of one caller."""

    def __init__(self, wish: Wish, wait_s: float = WAIT_S) -> None:
        """Start nothing yet."""
        self.wish = wish
        self._wait_s = wait_s
        self._known = None if wish.patterns else Redactor((), secrets=wish.secrets, key=wish.key)
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    def at_once(self, body: bytes) -> tuple[bytes, int] | None:
        """Return a body without what is taken out, and how many matches; None where that may take its time."""
        return None if self._known is None or len(body) > SHORT_BYTES else self._known.redact(body)

    async def aside(self, body: bytes) -> tuple[bytes, int] | Refusal:
        """Return the same, worked out elsewhere, or why it was not."""
        try:
            async with asyncio.timeout(self._wait_s):
                async with self._turn:
                    return await self._asked(body)
        except TimeoutError:
            words = (
                f"looking for what llm.redact names took longer than {self._wait_s:g} s: one of its patterns is slow"
            )
            return Refusal(503, "redaction-slow", words, again=False)
        except Exception:  # noqa: BLE001 - for whatever reason, it is not redacted; a dead pipe has several here
            words = "looking for what llm.redact names has failed: out of memory, or its process was ended"
            return Refusal(503, "redaction-failed", words, again=False)

    def close(self) -> None:
        """End the process."""
        self._closed = True
        self._kill()

    async def _asked(self, body: bytes) -> tuple[bytes, int]:
        """Have one body answered; whatever comes in between ends the process, whose answer would be another's."""
        try:
            process = self._process
            if process is None or process.returncode is not None:
                process = await self._start()
            assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - both are pipes
            process.stdin.write(_BODY.pack(len(body)))
            process.stdin.write(body)
            await process.stdin.drain()
            length, count = _ANSWER.unpack(await process.stdout.readexactly(_ANSWER.size))
            return await process.stdout.readexactly(length), count
        except BaseException:
            self._kill()
            raise

    async def _start(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise EOFError
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-m", MODULE, stdin=pipe, stdout=pipe, stderr=null, env={}, cwd="/"
        )
        self._process = process
        assert process.stdin is not None  # noqa: S101 - a pipe
        wish = msgspec.json.encode(self.wish)
        process.stdin.write(_LENGTH.pack(len(wish)) + wish)
        return process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
