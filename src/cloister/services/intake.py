"""Connections whose request is still coming in: what the brokers of a user and of the system have in common.

A connection begins as a request (frames L, V, N); a whole one is given to `_dispatch`. What a request means, and in
which words it is refused, is for those who inherit.
"""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine

from cloister.errors import CloisterError
from cloister.host.frames import Frame, FrameError
from cloister.runs.request import Incoming
from cloister.services.connection import Connection
from cloister.services.uncaught import log_bug

BUG_AT_START, BUG = b"\x7d", b"\x46"
"""Exit codes: 125 tells that nothing was started, 70 is EX_SOFTWARE of sysexits.h."""


class Intake(ABC):
    """Reads requests; a bug in one must not take the others down."""

    bug: bytes
    """What the caller is told of a bug."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have no connection yet."""
        self._loop = loop
        self._incoming: dict[Connection, Incoming] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, sock: socket.socket) -> Connection:
        """Take a new connection, and wait for its request."""
        connection = Connection(self._loop, sock, self._frame, self._closed)
        self._incoming[connection] = Incoming()
        return connection

    def _connect(
        self, sock: socket.socket, on_frame: Callable[[Connection, Frame], None], on_close: Callable[[Connection], None]
    ) -> Connection:
        """Make a connection for a supervisor: an inner half, a detached outer half, another daemon."""
        return Connection(self._loop, sock, on_frame, on_close)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        """Have something done, and hold on to it meanwhile."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _closed(self, connection: Connection) -> None:
        if incoming := self._incoming.pop(connection, None):
            incoming.close()

    def _frame(self, connection: Connection, frame: Frame) -> None:
        incoming = self._incoming[connection]
        try:
            environment = incoming.take(frame)
            if environment is not None:
                self._dispatch(connection, incoming, environment)
        except FrameError:
            connection.abort()
        except CloisterError as error:
            self._refuse(connection, error)
        except Exception:  # noqa: BLE001  # a bug must not take the other runs down
            log_bug()
            connection.send("F", BUG + self.bug)
            connection.close()

    @abstractmethod
    def _dispatch(self, connection: Connection, incoming: Incoming, environment: list[bytes]) -> None:
        """Do what a whole request asks for."""

    @abstractmethod
    def _refuse(self, connection: Connection, error: CloisterError) -> None:
        """Send an error as the last word."""
