"""What the broker does with a connection: read a request, start a run or answer a question.

A connection begins as a request (frames L, V, N). `run` turns it into the outer link of a
run; `exec` into the link of a session; control verbs get one JSON answer. Errors are rendered
here and sent as the final frame, so the shim needs no words of its own.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import traceback
from collections.abc import Callable

import msgspec

from cloister.errors import CloisterError, render
from cloister.host.frames import Frame, FrameError
from cloister.host.owner import Owner
from cloister.runs import words
from cloister.runs.paths import Paths
from cloister.runs.request import Incoming, check_stdio, decode
from cloister.runs.supervise import Supervisor
from cloister.services.connection import Connection

_RUN_VERBS = ("run", "exec")


class Requests:
    """All connections of one broker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, paths: Paths, owner: Owner) -> None:
        """Recover crashed runs, then be ready."""
        self._loop = loop
        self._supervisor = Supervisor(loop, paths, owner, self._connect)
        self._pending: dict[Connection, Incoming] = {}
        self._forget: Callable[[Connection], None] = lambda _: None
        self._tasks: set[asyncio.Task[None]] = set()
        self._supervisor.recover()

    @property
    def busy(self) -> bool:
        """Whether a run is alive."""
        return self._supervisor.busy

    def accept(self, sock: socket.socket, forget: Callable[[Connection], None]) -> Connection:
        """Take a new client."""
        self._forget = forget
        connection = Connection(self._loop, sock, self._frame, self._closed)
        self._pending[connection] = Incoming()
        return connection

    async def close(self) -> None:
        """End all runs."""
        await self._supervisor.close()

    def _connect(
        self, sock: socket.socket, on_frame: Callable[[Connection, Frame], None], on_close: Callable[[Connection], None]
    ) -> Connection:
        """Make a connection for the supervisor: an inner half, or a detached outer half."""
        return Connection(self._loop, sock, on_frame, on_close)

    def _closed(self, connection: Connection) -> None:
        pending = self._pending.pop(connection, None)
        if pending:
            pending.close()
        self._forget(connection)

    def _frame(self, connection: Connection, frame: Frame) -> None:
        pending = self._pending[connection]
        try:
            environment = pending.take(frame)
            if environment is not None:
                self._dispatch(connection, pending, environment)
        except FrameError:
            connection.abort()
        except CloisterError as error:
            self._refuse(connection, error)
        except Exception:  # noqa: BLE001  # a bug must not take the other runs down
            traceback.print_exc()
            sys.stderr.flush()
            text = "cloister: a bug in the broker; its log has the traceback [broker-bug]\n"
            connection.send("F", bytes([70]) + text.encode())
            connection.close()

    def _dispatch(self, connection: Connection, pending: Incoming, environment: list[bytes]) -> None:
        verb = pending.fields.get("verb", "")
        if verb in _RUN_VERBS:
            check_stdio(pending.descriptors)
            if pending.fields.get("raw") and not _understand(pending):
                connection.send("H")
                connection.close()
                return
            self._pending.pop(connection)
            task = self._loop.create_task(self._start(verb, connection, pending, environment))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        answer = self._supervisor.control(verb, pending.fields)
        connection.send("J", msgspec.json.encode(answer))
        connection.close()

    async def _start(self, verb: str, connection: Connection, pending: Incoming, environment: list[bytes]) -> None:
        try:
            if verb == "run":
                request = decode(pending.fields, pending.words, environment)
                await self._supervisor.start(request, connection, pending.descriptors[:3], self._forget)
            else:
                self._supervisor.execute(
                    pending.fields, pending.words, environment, connection, pending.descriptors, self._forget
                )
        except CloisterError as error:
            self._refuse(connection, error)
        except Exception:  # noqa: BLE001  # a bug must not take the other runs down
            traceback.print_exc()
            sys.stderr.flush()
            connection.send(
                "F", bytes([125]) + b"cloister: a bug in the broker; its log has the traceback [broker-bug]\n"
            )
            connection.close()
        finally:
            pending.close()

    def _refuse(self, connection: Connection, error: CloisterError) -> None:
        """Send an error as the last word: 125 for runs (or 126/127), sysexits for the rest."""
        pending = self._pending.get(connection)
        runs = pending is None or pending.fields.get("verb") in _RUN_VERBS
        code = error.exit_code if not runs or error.exit_code in (126, 127) else 125
        connection.send("F", bytes([code]) + (render(error) + "\n").encode("utf-8", "backslashreplace"))
        connection.close()


def _understand(pending: Incoming) -> bool:
    """Read words that came raw; return False for what the command line itself must do, such as help.

    Raises:
        UsageError: the words are wrong.
    """
    expanded = words.expand(pending.fields, [os.fsdecode(word) for word in pending.words])
    if expanded is None:
        return False
    pending.fields, command = expanded
    pending.words = [os.fsencode(word) for word in command]
    return True
