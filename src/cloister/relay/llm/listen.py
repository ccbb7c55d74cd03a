"""The same proxy on a TCP port of loopback, for callers that are known by a token instead of a socket of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from cloister.egress.http1 import HttpError
from cloister.llm import errors
from cloister.llm.errors import Refusal
from cloister.relay.connection import HttpConnection
from cloister.relay.exchange import Exchange
from cloister.relay.llm.entry import Identify, handle
from cloister.relay.llm.service import Inference
from cloister.relay.override import override
from cloister.relay.session import Limits

_LOOK_S = 5.0
_STATUS = {"request-timeout": 408, "head-too-large": 431}
Other = Callable[[Exchange], bool]
"""Serves what is no model traffic, such as `/metrics`; False when it is none of its business."""


def _nothing(_exchange: Exchange) -> bool:
    return False


class ModelServer:
    """Listens, and holds the connections."""

    def __init__(
        self, service: Inference, identify: Identify, limits: Limits | None = None, other: Other = _nothing
    ) -> None:
        """Take who answers; `start` begins."""
        self._service, self._identify, self._other = service, identify, other
        self._limits = limits or Limits(connections=4096)
        self._clients: set[HttpConnection] = set()
        self._server: asyncio.AbstractServer | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port, which the kernel chooses for 0.

        Raises:
            OSError: the address is taken.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connection, host, port, backlog=1024)
        self._sweeper = loop.call_later(_LOOK_S, self._sweep)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for client in list(self._clients):
            client.abort()
        await asyncio.sleep(0)

    def _connection(self) -> asyncio.BaseProtocol:
        if len(self._clients) >= self._limits.connections:
            return _Full()
        connection = HttpConnection(self._limits, self._handle, _unreadable)
        self._clients.add(connection)
        connection.on_lost.append(partial(self._clients.discard, connection))
        return connection

    def _handle(self, exchange: Exchange) -> None:
        if not self._other(exchange):
            handle(self._service, self._identify, exchange)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for client in list(self._clients):
            client.sweep(loop.time())
        self._sweeper = loop.call_later(_LOOK_S, self._sweep)


class _Full(asyncio.Protocol):
    """Turns a connection away that would be one too many."""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        refusal = Refusal(503, "too-many-connections", "too many connections are open", 5)
        assert isinstance(transport, asyncio.WriteTransport)  # noqa: S101 - TCP
        transport.write(errors.response("chat", refusal, close=True))
        transport.close()


def _unreadable(_connection: HttpConnection, error: HttpError) -> bytes:
    """Return the answer to what is no request."""
    status = _STATUS.get(error.reason, 400)
    return errors.response("chat", Refusal(status, error.reason, error.explanation, again=False), close=True)
