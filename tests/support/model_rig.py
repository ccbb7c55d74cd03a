"""The inference proxy on a free port of loopback, before an upstream that does exactly what a test says.

`Script` answers each connection with raw bytes, so that an upstream can be slow, broken or hostile; `Rig` holds the
proxy, books in memory and a caller. Everything runs in the test's own event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Self

from cloister.llm.access import Access
from cloister.llm.budgets import Account, compile_limits
from cloister.llm.ledger import Row, Spent
from cloister.llm.redact import wish_of
from cloister.llm.tokens import Usage
from cloister.llm.upstreams import compile_upstream
from cloister.policy.model import Llm, Provider
from cloister.relay.llm.listen import ModelServer
from cloister.relay.llm.service import Bounds, Caller, Inference
from cloister.relay.llm.supply import Supply
from cloister.relay.session import Limits
from cloister.runs.model_signers import signer_for
from cloister.runs.redaction import Redaction

KEY = "made-up-real-key"
PLACEHOLDER = "cloister-placeholder-1"
MESSAGE = {"model": "claude-x", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"input_tokens": 11, "output_tokens": 5}
ANSWER = json.dumps({"type": "message", "model": "claude-x", "usage": USAGE}).encode()


class MemoryBooks:
    """Books that forget with the process, and check that every call is opened once and closed once."""

    def __init__(self) -> None:
        """Begin empty."""
        self.open: dict[str, Row] = {}
        self.rows: list[Row] = []
        self.refusals: list[Row] = []
        self.full = False

    def opened(self, row: Row) -> None:
        """Note a call."""
        if self.full:
            raise OSError(28, "No space left on device")
        assert row.id not in self.open
        self.open[row.id] = row

    def closed(self, row: Row) -> None:
        """Close it."""
        del self.open[row.id]
        self.rows.append(row)

    def refused(self, row: Row) -> None:
        """Note a refusal."""
        self.refusals.append(row)

    def spent(self, agent: str, since: float, until: float, run: str = "", user: str = "") -> Spent:
        """Add up; all rows are one user's."""
        del user
        rows = [row for row in (*self.open.values(), *self.rows) if row.agent == agent and since <= row.time < until]
        rows = [row for row in rows if not run or row.run == run]
        tokens = [
            row.input_tokens + row.cache_read_tokens + row.cache_write_5m_tokens + row.cache_write_1h_tokens
            + row.output_tokens
            for row in rows
        ]  # fmt: skip
        return Spent(len(rows), sum(tokens), sum(row.cost_usd for row in rows))


class FlatPrice:
    """A dollar for a million tokens of any kind."""

    label = "flat"

    def cost(self, usage: Usage) -> float:
        """Return dollars."""
        return usage.cost_usd if usage.cost_usd is not None else usage.total / 1_000_000


class FlatPrices:
    """The same price for every model but those that begin with `unknown`."""

    def find(self, _protocol: str, model: str, _provider: str = "") -> FlatPrice | None:
        """Return it."""
        return None if model.startswith("unknown") else FlatPrice()


class Key:
    """A key that tests change."""

    def __init__(self, value: str = KEY) -> None:
        """Begin with a value."""
        self.value, self.asked, self.rejections = value, 0, 0

    async def read(self) -> str:
        """Return it."""
        self.asked += 1
        return self.value

    def rejected(self) -> None:
        """Count."""
        self.rejections += 1


class Asked(NamedTuple):
    """A request as it reached the upstream."""

    head: bytes
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    def field(self, name: str) -> list[str]:
        """Return the values of a header field."""
        lines = [line.partition(b": ") for line in self.head.split(b"\r\n")[1:]]
        return [value.decode("latin-1") for key, _, value in lines if key.lower() == name.encode()]


Step = bytes | float | Callable[[asyncio.StreamWriter], Awaitable[None]]
"""Bytes to write, seconds to wait, or something else to do; `HANG_UP` closes."""


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close the connection."""
    writer.close()


async def reset(writer: asyncio.StreamWriter) -> None:
    """Break the connection off."""
    writer.transport.abort()


def vanish(writer: asyncio.StreamWriter) -> None:
    """Leave as a killed client does: by a reset. A plain close looks like the end of a request that still waits."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def whole(body: bytes = ANSWER, status: str = "200 OK", fields: str = "", kind: str = "application/json") -> bytes:
    """Return an answer of known length."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{fields}\r\n"
    return head.encode() + body


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Return one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(data: object, name: str = "") -> bytes:
    """Return one server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


START = event({"type": "message_start", "message": {"model": "claude-x", "usage": {**USAGE, "output_tokens": 1}}})
DELTA = event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello " * 5}})
FINISH = event({"type": "message_delta", "usage": {"output_tokens": 5}}) + event({"type": "message_stop"})


class Script:
    """An upstream. The n-th request gets the n-th list of steps, the last one again and again."""

    def __init__(self, *answers: Sequence[Step], tls: ssl.SSLContext | None = None) -> None:
        """Take the answers; with a context the upstream speaks TLS."""
        self._tls = tls
        self.answers = [list(answer) for answer in answers] or [[whole()]]
        self.asked: list[Asked] = []
        self.connections = 0
        self.hung_up = asyncio.Event()
        """Set when a client closed before its answer was complete."""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 27, ssl=self._tls)
        scheme, host = ("https", "localhost") if self._tls else ("http", "127.0.0.1")
        self.url = f"{scheme}://{host}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.is_closing():
                await self._answer(reader, writer)
        writer.close()
        self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        self.asked.append(Asked(head, await reader.readexactly(length)))
        steps = self.answers[min(len(self.asked), len(self.answers)) - 1]
        for step in steps:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif isinstance(step, float):
                gone = asyncio.ensure_future(reader.read(1))
                await asyncio.wait([gone], timeout=step)
                if gone.done():
                    self.hung_up.set()
                    return writer.close()
                gone.cancel()
                await asyncio.sleep(0)
            else:
                await step(writer)
        return None


class Reply(NamedTuple):
    """An answer as the client got it."""

    status: int
    fields: dict[str, str]
    body: bytes
    clean: bool
    """Whether the body came to the end that its framing announced."""

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


class Rig:
    """The proxy, and one caller."""

    def __init__(self, *urls: str, bounds: Bounds | None = None, provider: dict[str, Any] | None = None, **llm: Any):
        """Set up before upstreams at these addresses, all with the same table."""
        self.books = MemoryBooks()
        self.service = Inference(self.books, FlatPrices, bounds)
        self.llm = Llm(**{"requests_per_minute": 1000, **llm})
        self.key = Key()
        table = {"protocol": "anthropic", **(provider or {})}
        upstreams = [compile_upstream(f"up{index}", Provider(base_url=url, **table)) for index, url in enumerate(urls)]
        self.supplies = tuple(Supply(one, self.key, signer_for(one, self.key)) for one in upstreams)
        self.account = Account(compile_limits(self.llm), lambda *span: self.books.spent("agent", *span))
        self.caller = Caller("run-1", "agent", "someone", Access(self.llm), self.supplies, self.account)
        self.caller.max_tokens, self.caller.fallback = self.llm.max_tokens, self.llm.fallback
        wish = wish_of(self.llm)
        self.caller.redactor = Redaction(wish) if wish else None
        self.caller.asks = self.llm.on_exhausted == "ask"
        self.server = ModelServer(self.service, lambda tokens: self.caller if PLACEHOLDER in tokens else None, Limits())
        self.port = 0

    async def __aenter__(self) -> Self:
        """Listen."""
        self.port = await self.server.start("127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End; nothing that was opened stays open."""
        await self.server.close()
        await self.service.close()
        if self.caller.redactor is not None:
            self.caller.redactor.close()
        await asyncio.sleep(0.02)
        assert not self.books.open, "a call was opened and never closed"
        assert self.account.active == 0
        assert self.service.buffered == 0

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection."""
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 26)

    def request(self, body: object = MESSAGE, path: str = "/v1/messages", method: str = "POST", **fields: str) -> bytes:
        """Return the bytes of a request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        given = {"host": "x", "x-api-key": PLACEHOLDER, **{name.replace("_", "-"): one for name, one in fields.items()}}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value)]
        if method == "POST":
            lines.append(f"content-length: {len(data)}")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data

    async def ask(
        self, body: object = MESSAGE, path: str = "/v1/messages", method: str = "POST", **fields: str
    ) -> Reply:
        """Send a request on a connection of its own and return the answer."""
        reader, writer = await self.connect()
        writer.write(self.request(body, path, method, **fields))
        try:
            async with asyncio.timeout(10):
                return await read_reply(reader, head_only=method == "HEAD")
        finally:
            writer.close()

    async def settled(self, count: int = 1) -> list[Row]:
        """Return the rows, when so many are closed."""
        for _ in range(500):
            if len(self.books.rows) >= count:
                break
            await asyncio.sleep(0.01)
        assert len(self.books.rows) == count, self.books
        return self.books.rows


async def read_reply(reader: asyncio.StreamReader, *, head_only: bool = False) -> Reply:
    """Read one answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(head[0].split()[1])
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    if status == 100:
        return await read_reply(reader)
    if head_only:
        return Reply(status, fields, b"", clean=True)
    if "content-length" in fields:
        try:
            return Reply(status, fields, await reader.readexactly(int(fields["content-length"])), clean=True)
        except asyncio.IncompleteReadError as error:
            return Reply(status, fields, error.partial, clean=False)
    body = b""
    try:
        while size := int((await reader.readline()) or b"", 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
    except (ValueError, OSError, asyncio.IncompleteReadError):
        return Reply(status, fields, body, clean=False)
    return Reply(status, fields, body, clean=True)
