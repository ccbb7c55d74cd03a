"""Assuan lines between a client inside and the person's gpg-agent, as the filter says.

One connection of a client has one connection to the agent, opened with the first question that
may be asked. An answer is read to its end (OK or ERR) before it is judged; the agent's own
questions (INQUIRE) are declined, since nothing that may be asked here leads to one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cloister.credentials.gpg_agent import GREETING, MAX_ANSWER, MAX_LINE, GpgAgentFilter, GpgStep
from cloister.credentials.signing import SigningEvent, denied
from cloister.relay.agent_sockets import ANSWER_S, IDLE_S, AgentError, Stream, dial

LIMIT = MAX_LINE + 2


class GpgAgentClients:
    """Serves the clients of one run."""

    def __init__(
        self, path: str, uid: int, make_filter: Callable[[], GpgAgentFilter], record: Callable[[SigningEvent], None]
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
        writer.write(GREETING)
        try:
            step = GpgStep()
            while not step.close:
                async with asyncio.timeout(IDLE_S):
                    line = await _line(reader)
                step = self._noted(judge.request(line))
                if step.ask:
                    step = self._noted(await _asked(agent, judge, step.ask))
                writer.write(step.reply)
                await writer.drain()
        except asyncio.LimitOverrunError:
            self._record(denied("request-too-long", f"a line to the gpg-agent has at most {MAX_LINE} bytes", use="gpg"))
        finally:
            agent.close()

    def _noted(self, step: GpgStep) -> GpgStep:
        if step.event is not None:
            self._record(step.event)
        return step


class _Agent:
    """One connection to the person's agent, made when it is needed."""

    def __init__(self, path: str, uid: int) -> None:
        self._path = path
        self._uid = uid
        self._stream: Stream | None = None

    async def ask(self, line: bytes) -> list[bytes]:
        """Return the lines of the agent's answer.

        Raises:
            AgentError: it cannot be reached, is another user's, or says too much.
            OSError: it is slow, or the connection broke.
            EOFError: it closed the connection.
        """
        async with asyncio.timeout(ANSWER_S):
            if self._stream is None:
                self._stream = await dial(self._path, self._uid, LIMIT)
                await self._answer(self._stream)  # its greeting
            self._stream[1].write(line)
            return await self._answer(self._stream)

    async def _answer(self, stream: Stream) -> list[bytes]:
        reader, writer = stream
        lines: list[bytes] = []
        size = 0
        while not (lines and lines[-1].split(b" ", 1)[0] in {b"OK", b"ERR"}):
            lines.append(await _line(reader))
            size += len(lines[-1])
            if size > MAX_ANSWER:
                raise AgentError("the gpg-agent says too much")
            if lines[-1].startswith(b"INQUIRE"):
                writer.write(b"CAN\n")
        return lines

    def close(self) -> None:
        """Leave the agent."""
        if self._stream is not None:
            self._stream[1].transport.abort()
            self._stream = None


async def _asked(agent: _Agent, judge: GpgAgentFilter, line: bytes) -> GpgStep:
    try:
        return judge.answered(await agent.ask(line))
    except (AgentError, OSError, EOFError, asyncio.LimitOverrunError):
        agent.close()  # an answer that comes late must not be taken for the next one
        return judge.unreachable()


async def _line(reader: asyncio.StreamReader) -> bytes:
    """Return one line without its end.

    Raises:
        EOFError: the other side has gone.
        asyncio.LimitOverrunError: it is too long.
    """
    return (await reader.readuntil(b"\n")).removesuffix(b"\n").removesuffix(b"\r")
