"""What the broker does with a connection: read a request, start a run or answer a question.

A connection begins as a request (frames L, V, N). `run` turns it into the outer link of a
run; `exec` into the link of a session; control verbs get one JSON answer. Errors are rendered
here and sent as the final frame, so the shim needs no words of its own.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from cloister.errors import CloisterError, render
from cloister.host.owner import Owner
from cloister.runs import words
from cloister.runs.paths import Paths
from cloister.runs.request import Incoming, check_stdio, decode
from cloister.runs.supervise import Supervisor
from cloister.services.connection import Connection
from cloister.services.intake import BUG, BUG_AT_START, Intake
from cloister.services.uncaught import log_bug

_RUN_VERBS = ("run", "exec")


class Requests(Intake):
    """All connections of one broker."""

    bug = b"cloister: a bug in the broker; its log has the traceback [broker-bug]\n"

    def __init__(self, loop: asyncio.AbstractEventLoop, paths: Paths, owner: Owner) -> None:
        """Recover crashed runs, then be ready."""
        super().__init__(loop)
        self._supervisor = Supervisor(loop, paths, owner, self._connect)
        self._forget: Callable[[Connection], None] = lambda _: None
        self._supervisor.recover()

    @property
    def busy(self) -> bool:
        """Whether a run is alive."""
        return self._supervisor.busy

    def accept(self, sock: socket.socket, forget: Callable[[Connection], None]) -> Connection:
        """Take a new client."""
        self._forget = forget
        return self.take(sock)

    async def close(self) -> None:
        """End all runs."""
        await self._supervisor.close()

    def _closed(self, connection: Connection) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        super()._closed(connection)
        self._forget(connection)

    def _dispatch(  # type: ignore[explicit-override]  # Python 3.12
        self, connection: Connection, incoming: Incoming, environment: list[bytes]
    ) -> None:
        verb = incoming.fields.get("verb", "")
        if verb in _RUN_VERBS:
            check_stdio(incoming.descriptors)
            if incoming.fields.get("raw") and not _understand(incoming):
                connection.send("H")
                connection.close()
                return
            self._incoming.pop(connection)
            self._begin(self._start(verb, connection, incoming, environment))
            return
        later = {"vm-snapshot": self._supervisor.snapshot, "vm-figures": self._supervisor.figures}.get(verb)
        if later:
            self._begin(self._answer_later(connection, later(incoming.fields)))
            return
        answer = self._supervisor.control(verb, incoming.fields)
        connection.send("J", msgspec.json.encode(answer))
        connection.close()

    async def _start(self, verb: str, connection: Connection, incoming: Incoming, environment: list[bytes]) -> None:
        try:
            if verb == "run":
                request = decode(incoming.fields, incoming.words, environment)
                await self._supervisor.start(request, connection, incoming.descriptors[:3], self._forget)
            else:
                self._supervisor.execute(
                    incoming.fields, incoming.words, environment, connection, incoming.descriptors, self._forget
                )
        except CloisterError as error:
            self._refuse(connection, error)
        except Exception:  # noqa: BLE001  # a bug must not take the other runs down
            log_bug()
            connection.send("F", BUG_AT_START + self.bug)
            connection.close()
        finally:
            incoming.close()

    async def _answer_later(self, connection: Connection, asked: Awaitable[dict[str, Any]]) -> None:
        try:
            answer = await asked
            connection.send("J", msgspec.json.encode(answer))
            connection.close()
        except CloisterError as error:
            self._refuse(connection, error)
        except Exception:  # noqa: BLE001  # a bug must not take the runs down
            log_bug()
            connection.send("F", BUG + self.bug)
            connection.close()

    def _refuse(self, connection: Connection, error: CloisterError) -> None:  # type: ignore[explicit-override]  # Python 3.12
        """Send an error as the last word: 125 for runs (or 126/127), sysexits for the rest."""
        incoming = self._incoming.get(connection)
        runs = incoming is None or incoming.fields.get("verb") in _RUN_VERBS
        code = error.exit_code if not runs or error.exit_code in (126, 127) else 125
        connection.send("F", bytes([code]) + (render(error) + "\n").encode("utf-8", "backslashreplace"))
        connection.close()


def _understand(incoming: Incoming) -> bool:
    """Read words that came raw; return False for what the command line itself must do, such as help.

    Raises:
        UsageError: the words are wrong.
    """
    expanded = words.expand(incoming.fields, [os.fsdecode(word) for word in incoming.words])
    if expanded is None:
        return False
    incoming.fields, command = expanded
    incoming.words = [os.fsencode(word) for word in command]
    return True
