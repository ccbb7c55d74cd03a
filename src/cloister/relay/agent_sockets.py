"""A run's own agent sockets: how their clients are counted, timed and ended, and how an agent is dialled.

How many clients there are, how long a message is and how long anybody is waited for has bounds.
What a client says is for `relay.ssh_agent`, and what may be asked of the person's agent is for
`credentials`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable

MAX_CLIENTS = 32
IDLE_S = 3600.0
"""Silence of a client after which it is left."""
ANSWER_S = 180.0
"""How long an agent may take: a person may have to touch a key, or to type a passphrase."""
_CREDENTIALS = "3i"  # struct ucred: pid, uid, gid (unix(7))

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class AgentError(Exception):
    """The person's agent cannot be asked."""


async def dial(path: str, uid: int, limit: int) -> Stream:
    """Connect to a person's agent, and make sure that it is theirs, by the kernel's word.

    Args:
        path: its Unix socket.
        uid: the person.
        limit: bytes of one message of the agent.

    Raises:
        AgentError: nobody listens there, or somebody else does.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=limit)
    except OSError as error:
        raise AgentError(f"{path}: {error.strerror}") from error
    sock = writer.get_extra_info("socket")
    size = struct.calcsize(_CREDENTIALS)
    _, peer, _ = struct.unpack(_CREDENTIALS, sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if peer not in {uid, 0}:
        writer.close()
        raise AgentError(f"{path} belongs to another user")
    return reader, writer


class AgentServer:
    """Serves one socket of one run."""

    def __init__(self, serve: Serve, limit: int) -> None:
        """Take what serves one client, and the bytes of its longest message."""
        self._serve = serve
        self._limit = limit
        self._server: asyncio.AbstractServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, sock: socket.socket) -> None:
        """Serve on a bound Unix socket that the caller made; it is closed by `close`."""
        self._server = await asyncio.start_unix_server(self._accept, sock=sock, limit=self._limit)

    async def close(self) -> None:
        """Stop serving and end what is open."""
        if self._server is not None:
            self._server.close()
        tasks = self.drop()
        await asyncio.gather(*tasks, return_exceptions=True)

    def drop(self) -> list[asyncio.Task[None]]:
        """End what is open; new clients are served. Return what is still ending."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        return tasks

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if len(self._tasks) >= MAX_CLIENTS or task is None:
            writer.transport.abort()
            return
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            writer.transport.abort()  # the client has gone or was too slow, or the run is over
        finally:
            self._tasks.discard(task)
            writer.close()
