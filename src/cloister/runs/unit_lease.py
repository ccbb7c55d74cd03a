"""The lease of one run, as the system's broker holds it: what it tells the user's broker, and what that may ask.

One lease is for one run: nothing asked here reaches another. When it closes, the run ends.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, Protocol

import msgspec

from cloister.errors import CloisterError, UsageError, render
from cloister.host.frames import Frame, FrameError
from cloister.runs.active import ActiveRun
from cloister.runs.links import Connect, Link
from cloister.runs.request import Incoming, check_stdio
from cloister.runs.store import Receipt
from cloister.runs.unit_words import Told, encode, read_closing_words

_GRACE_S = 10.0


class Execute(Protocol):
    """Runs another command in the run."""

    def __call__(
        self, fields: dict[str, str], words: list[bytes], environment: list[bytes], link: Any,
        descriptors: tuple[int, ...],
    ) -> None:  # fmt: skip
        """Do that; raises CloisterError."""


class Lease:
    """One connection to the broker of a user."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connect: Connect, sock: socket.socket) -> None:
        """Listen for its end, and for nothing else yet."""
        self.leads = False
        """hostd has the plan: from now on the caller's broker is told here how it went."""
        self._stop_s: float | None = None
        self._loop, self._connect = loop, connect
        self._run: ActiveRun | None = None
        self._execute: Execute | None = None
        self._incoming = Incoming()
        self._words: asyncio.Future[tuple[str, ...]] = loop.create_future()
        self._link: Link = connect(sock, self._frame, self._gone)

    @property
    def closed(self) -> bool:
        """Whether the user's broker has gone."""
        return self._link.closed

    def say(self, told: Told) -> None:
        """Tell something."""
        self._link.send("J", encode(told))

    def tell(self, fields: dict[str, object]) -> None:
        """Tell an event, or that the agent runs."""
        self._link.send("J", msgspec.json.encode(fields))

    def refuse(self, payload: bytes) -> None:
        """Say that nothing was started (the payload of an `F`), and close."""
        self._link.send("F", payload)
        self._link.close()

    def close(self) -> None:
        """Close it."""
        self._link.close()

    def serve(self, run: ActiveRun, execute: Execute) -> None:
        """Take requests for a run from now on."""
        self._run, self._execute = run, execute
        if self._stop_s is not None:  # asked for before there was something to stop
            run.live.stop(self._stop_s)

    async def finish(self, receipt: Receipt, patience_s: float) -> tuple[str, ...]:
        """Send the receipt; return what the user's broker found in the workspace, nothing where it does not say."""
        self.say(Told(receipt=receipt))
        try:
            return await asyncio.wait_for(self._words, patience_s)
        except TimeoutError:
            return ()
        finally:
            self._run = None
            self._link.close()

    def _gone(self, _: Link) -> None:
        self._incoming.close()
        if not self._words.done():
            self._words.set_result(())
        if self._run is not None:
            self._run.live.outer_closed()

    def _frame(self, _: Link, frame: Frame) -> None:
        if frame.kind == "W":
            for descriptor in frame.descriptors:
                os.close(descriptor)
            if not self._words.done():
                self._words.set_result(read_closing_words(frame.payload))
            return
        try:
            environment = self._incoming.take(frame)
        except FrameError:
            self._link.close()  # whoever does not keep to the protocol has no lease any more
            return
        if environment is None:
            return
        asked, self._incoming = self._incoming, Incoming()
        try:
            self._obey(asked, environment)
        finally:
            asked.close()

    def _obey(self, asked: Incoming, environment: list[bytes]) -> None:
        run = self._run
        match asked.fields.get("verb"):
            case "stop" if run and asked.fields.get("reason") == "protection-lost":
                message = "a protected file was replaced on the host, which takes its protection away"
                where = [word.decode("utf-8", "replace") for word in asked.words]
                run.live.refuse("protection-lost", message, where)
            case "stop":
                self._stop_s = _seconds(asked.fields.get("grace", ""))
                if run:
                    run.live.stop(self._stop_s)
            case "exec" if len(asked.descriptors) == len(("link", "input", "output", "error")):
                self._run_command(asked, environment)

    def _run_command(self, asked: Incoming, environment: list[bytes]) -> None:
        """Run another command for whoever is behind the first descriptor."""
        try:
            sock = socket.socket(fileno=os.dup(asked.descriptors[0]))
        except OSError:
            return  # no socket: there is nobody to tell
        link = self._connect(sock, lambda *_: None, lambda *_: None)
        try:
            check_stdio(asked.descriptors[1:])
            if self._run is None or self._execute is None:
                raise UsageError("run-not-alive", "the run is ending", remedy="cloister ps")
            fields = {**asked.fields, "run": self._run.plan.run}
            self._execute(fields, asked.words, environment, link, asked.descriptors[1:])
        except CloisterError as error:
            link.send("F", bytes([125]) + (render(error) + "\n").encode("utf-8", "backslashreplace"))
            link.close()


def _seconds(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 3600.0)
    except ValueError:
        return _GRACE_S
