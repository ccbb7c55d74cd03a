"""The network of a run under systemd while it lasts, as the system's broker sees it: the channel of pasta's unit.

Its end is the end of the run, as pasta's is for a run of a user's own. The last thing that comes is what the packet
filter of the namespace has counted. hostd starts and stops the unit (`host/unit_network.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

from cloister.egress.nft import Counts, counts
from cloister.host.frames import Frame
from cloister.runs.links import Connect

_LAST_WORDS_S = 2.0
_LONGEST = 500


class UnitNetwork:
    """One run's network."""

    def __init__(self, connect: Connect, channel: int, on_failed: Callable[[str], None]) -> None:
        """Take the channel, which is ours from now on.

        Args:
            connect: makes a link of it.
            channel: of the shim in pasta's unit.
            on_failed: called once with a text when there is no network any more.
        """
        self.counted: Counts | None = None
        self._on_failed = on_failed
        self._over = False
        self._closed = asyncio.Event()
        self._link = connect(socket.socket(fileno=channel), self._frame, self._close)

    def namespace_ready(self, pid: int) -> None:
        """Do nothing: of a unit's network hostd is the one to hear, never the caller's outer half."""

    def report(self, text: bytes) -> None:
        """Do nothing, for the same reason."""

    async def finish(self) -> None:
        """Take in what was counted, once the unit was stopped."""
        self._over = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), _LAST_WORDS_S)
        self.close()

    def close(self) -> None:
        """Give the channel up: the shim at its other end leaves, and takes pasta along."""
        self._over = True
        self._link.close()

    def _frame(self, _: Any, frame: Frame) -> None:
        for descriptor in frame.descriptors:
            os.close(descriptor)
        if frame.kind == "W":
            with contextlib.suppress(ValueError):
                self.counted = counts(frame.payload)
        elif frame.kind == "F":
            said = frame.payload[:_LONGEST].decode("utf-8", "replace")
            self._fail("".join(char if char.isprintable() else " " for char in said).strip())

    def _close(self, _: Any) -> None:
        self._closed.set()
        self._fail("pasta ended, and the network with it: its unit was stopped")

    def _fail(self, why: str) -> None:
        if not self._over:
            self._over = True
            self._on_failed(why)
