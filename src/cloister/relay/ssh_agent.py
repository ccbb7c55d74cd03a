"""ssh-agent messages between a client inside and the person's agent, as the filter says.

One connection of a client has one connection to the agent, opened with the first question that
may be asked. Requests are served in their order, one at a time: a client has never more than one
question open. Nothing is judged here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cloister.credentials.signing import SigningEvent, denied
from cloister.credentials.ssh_agent import MAX_MESSAGE, SshAgentFilter, Step
from cloister.credentials.ssh_wire import string
from cloister.relay.agent_sockets import ANSWER_S, IDLE_S, AgentError, Stream, dial

_HEADER = 4
LIMIT = MAX_MESSAGE + _HEADER


class _TooLongError(Exception):
    """A message is empty, or longer than any may be."""


class SshAgentClients:
    """Serves the clients of one run."""

    def __init__(
        self, path: str, uid: int, make_filter: Callable[[], SshAgentFilter], record: Callable[[SigningEvent], None]
    ) -> None:
        """Know the agent's socket and whose it must be; make a filter per client; say where events go."""
        self._path = path
        self._uid = uid
        self._make_filter = make_filter
        self._record = record

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client until it leaves.

        Raises:
            OSError: it was silent for too long, or its connection broke.
            EOFError: it has left.
        """
        judge = self._make_filter()
        agent = _Agent(self._path, self._uid)
        try:
            while True:
                async with asyncio.timeout(IDLE_S):
                    message = await _message(reader)
                step = self._noted(judge.request(message))
                if step.ask:
                    step = self._noted(await _asked(agent, judge, step.ask))
                writer.write(string(step.reply))
                await writer.drain()
        except _TooLongError:
            why = f"a message to the ssh-agent has 1 to {MAX_MESSAGE} bytes"
            self._record(denied("request-too-long", why))
        finally:
            agent.close()

    def _noted(self, step: Step) -> Step:
        if step.event is not None:
            self._record(step.event)
        return step


class _Agent:
    """One connection to the person's agent, made when it is needed."""

    def __init__(self, path: str, uid: int) -> None:
        self._path = path
        self._uid = uid
        self._stream: Stream | None = None

    async def ask(self, message: bytes) -> bytes:
        """Return the agent's answer.

        Raises:
            AgentError: it cannot be reached, or is another user's.
            OSError: it is slow, or the connection broke.
            EOFError: it closed the connection.
        """
        async with asyncio.timeout(ANSWER_S):
            if self._stream is None:
                self._stream = await dial(self._path, self._uid, LIMIT)
            reader, writer = self._stream
            writer.write(string(message))
            await writer.drain()
            return await _message(reader)

    def close(self) -> None:
        """Leave the agent."""
        if self._stream is not None:
            self._stream[1].transport.abort()
            self._stream = None


async def _asked(agent: _Agent, judge: SshAgentFilter, message: bytes) -> Step:
    try:
        return judge.answered(await agent.ask(message))
    except (AgentError, OSError, EOFError, _TooLongError):
        agent.close()  # an answer that comes late must not be taken for the next one
        return judge.unreachable()


async def _message(reader: asyncio.StreamReader) -> bytes:
    """Return one message, without its length.

    Raises:
        EOFError: the other side has gone.
        _TooLongError: no message is as long as this one says it is.
    """
    length = int.from_bytes(await reader.readexactly(_HEADER), "big")
    if not 0 < length <= MAX_MESSAGE:
        raise _TooLongError
    return await reader.readexactly(length)
