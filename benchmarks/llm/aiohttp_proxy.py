"""An inference proxy on aiohttp that does the same essential work: what a good team would write with a framework.

Every request: the token's Ed25519 signature checked (then cached), requests and tokens reserved before and settled
after, the real key put in, usage read from JSON and streams, a row written to SQLite in batches by a thread. A
program of its own: `python3 aiohttp_proxy.py UPSTREAM_PORT FOLDER` prints its port and a token. For benchmarks only:
it lacks limits, timeouts and most refusals.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import apsw
import jwt
import msgspec
import uvloop
from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from multidict import CIMultiDict

AUDIENCE = "bench"
REAL_KEY = "made-up-key-of-the-owner"
ESTIMATE = 300
BATCH_S = 0.05
# What belongs to one connection (RFC 9110, 7.6.1), and what the proxy writes itself.
REQUEST_ONLY = frozenset(
    ("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length",
     "authorization", "x-api-key", "accept-encoding", "cookie")
)  # fmt: skip
ANSWER_ONLY = frozenset(("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"))


class Usage(msgspec.Struct):
    """Tokens, as the Messages protocol tells them."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class Message(msgspec.Struct):
    """A message, or the event that opens one."""

    usage: Usage | None = None
    message: Message | None = None


DECODER = msgspec.json.Decoder(Message)


class Account:
    """What one agent may use, and what it has used."""

    def __init__(self) -> None:
        """Begin with budgets that never run out here, but are looked at each time."""
        self.minute: list[float] = []
        self.spent = self.reserved = 0

    def admit(self) -> bool:
        """Reserve, if there is room."""
        if self.spent + self.reserved + ESTIMATE > 1 << 60:
            return False
        self.reserved += ESTIMATE
        return True

    def settle(self, used: int) -> None:
        """Put what was used in the place of what was reserved."""
        self.reserved -= ESTIMATE
        self.spent += used


class Meter:
    """Reads usage as it passes."""

    def __init__(self, *, stream: bool) -> None:
        """Begin with nothing."""
        self.stream = stream
        self.rest = b""
        self.seen = Usage()

    def feed(self, data: bytes) -> None:
        """Take bytes of the answer, cut anywhere."""
        if not self.stream:
            self._note(DECODER.decode(data))
            return
        whole, _, self.rest = (self.rest + data).rpartition(b"\n")
        if b'"usage"' in whole:
            for line in whole.split(b"\n"):
                if line.startswith(b"data:") and b'"usage"' in line:
                    self._note(DECODER.decode(line[5:]))

    def _note(self, message: Message) -> None:
        usage = message.usage or (message.message.usage if message.message else None)
        if usage:
            for name in Usage.__struct_fields__:
                setattr(self.seen, name, getattr(usage, name) or getattr(self.seen, name))


class Ledger:
    """Rows to SQLite, in batches, from a thread."""

    def __init__(self, path: Path) -> None:
        """Open the database and start the thread."""
        self.rows: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        threading.Thread(target=self._write, args=(str(path),), daemon=True).start()

    def _write(self, path: str) -> None:
        database = apsw.Connection(path)
        database.execute("pragma journal_mode=wal; pragma synchronous=normal")
        database.execute("create table calls(time, agent, status, input, output, written, read, seconds)")
        while True:
            rows = [self.rows.get()]
            time.sleep(BATCH_S)
            while not self.rows.empty():
                rows.append(self.rows.get())
            with database:
                database.executemany("insert into calls values(?,?,?,?,?,?,?,?)", rows)


class Proxy:
    """The handler and what it holds."""

    def __init__(self, upstream: str, ledger: Ledger, key: Ed25519PrivateKey) -> None:
        """Keep it; `session` is made with the loop."""
        self.upstream = upstream
        self.ledger = ledger
        self.key = key.public_key()
        self.cache: dict[str, tuple[str, float]] = {}
        self.accounts: dict[str, Account] = {}
        self.session: ClientSession

    def agent(self, header: str) -> str:
        """Return who a token speaks for."""
        known = self.cache.get(header)
        if known is None or known[1] < time.time():
            claims = jwt.decode(header[7:], self.key, algorithms=["EdDSA"], audience=AUDIENCE)
            known = self.cache[header] = (claims["sub"], claims["exp"])
        return known[0]

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one request."""
        began = time.monotonic()
        try:
            agent = self.agent(request.headers.get("Authorization", ""))
        except jwt.InvalidTokenError:
            return web.Response(status=401)
        account = self.accounts.setdefault(agent, Account())
        if not account.admit():
            return web.Response(status=429, headers={"Retry-After": "60"})
        headers = CIMultiDict(
            (name, value) for name, value in request.headers.items() if name.lower() not in REQUEST_ONLY
        )
        headers["x-api-key"] = REAL_KEY
        body = await request.read()
        async with self.session.post(self.upstream + request.path_qs, headers=headers, data=body) as answer:
            meter = Meter(stream=answer.headers.get("Content-Type", "").startswith("text/event-stream"))
            kept = CIMultiDict(
                (name, value) for name, value in answer.headers.items() if name.lower() not in ANSWER_ONLY
            )
            response = await self._pass_on(request, answer, kept, meter)
        used = meter.seen
        account.settle(used.input_tokens + used.output_tokens)
        self.ledger.rows.put(
            (time.time(), agent, answer.status, used.input_tokens, used.output_tokens, used.cache_creation_input_tokens,
             used.cache_read_input_tokens, time.monotonic() - began)
        )  # fmt: skip
        return response

    async def _pass_on(
        self, request: web.BaseRequest, answer: Any, kept: CIMultiDict[str], meter: Meter
    ) -> web.StreamResponse:
        if not meter.stream:
            data = await answer.read()
            meter.feed(data)
            return web.Response(status=answer.status, headers=kept, body=data)
        response = web.StreamResponse(status=answer.status, headers=kept)
        response.enable_chunked_encoding()
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            meter.feed(piece)
            await response.write(piece)
        await response.write_eof()
        return response


async def main(upstream_port: int, folder: Path) -> None:
    """Serve until killed."""
    key = Ed25519PrivateKey.generate()
    proxy = Proxy(f"http://127.0.0.1:{upstream_port}", Ledger(folder / "aiohttp.db"), key)
    proxy.session = ClientSession(
        connector=TCPConnector(limit=0, keepalive_timeout=60), auto_decompress=False, timeout=ClientTimeout(total=None),
        cookie_jar=DummyCookieJar(), skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept"),
    )  # fmt: skip
    runner = web.ServerRunner(web.Server(proxy, access_log=None))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    now = int(time.time())
    token = jwt.encode({"sub": "bench", "aud": AUDIENCE, "iat": now, "exp": now + 86400}, key, algorithm="EdDSA")
    print(json.dumps({"port": runner.addresses[0][1], "token": token}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), Path(sys.argv[2])))
