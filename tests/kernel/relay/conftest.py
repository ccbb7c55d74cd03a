"""The relay on a real Unix socket, with servers on loopback that only these tests use."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Self

import pytest
import uvloop

from cloister.egress.events import EgressEvent
from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.policy.model import Egress
from cloister.relay.server import EgressServer
from cloister.relay.session import Limits, Session

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class CountingResolver:
    """Answers from a table and remembers what it was asked."""

    def __init__(self, table: dict[str, list[str]] | None = None) -> None:
        self.table = table or {}
        self.asked: list[str] = []

    async def resolve(self, name: str, _port: int) -> list[str]:
        """Return the next answer of the table."""
        self.asked.append(name)
        if name not in self.table:
            raise OSError(-2, "Name or service not known")
        answer = self.table[name]
        return answer.pop(0) if answer and isinstance(answer[0], list) else answer


class Relay:
    """One run's relay and what it recorded."""

    def __init__(self, path: Path, egress: Egress, table: dict | None = None, **session: Any) -> None:
        self.path = path
        self.events: list[EgressEvent] = []
        self.resolver = CountingResolver(table)
        self.session = Session(
            "run-1",
            compile_ruleset(egress, agent="claude"),
            compile_guard(egress, agent="claude"),
            self.resolver,
            self.events.append,
            **session,
        )
        self.server = EgressServer(self.session)

    async def __aenter__(self) -> Self:
        sock = socket.socket(socket.AF_UNIX)
        self.path.unlink(missing_ok=True)
        sock.bind(str(self.path))
        sock.listen(128)
        await self.server.start(sock)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.wait_for(self.server.close(), 5)
        assert self.server.stats.active == 0

    async def client(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect as a program in the sandbox does."""
        return await asyncio.open_unix_connection(str(self.path))

    async def talk(self, data: bytes, *, eof: bool = False) -> bytes:
        """Send bytes and return everything that comes back until the end."""
        reader, writer = await self.client()
        writer.write(data)
        if eof:
            writer.write_eof()
        try:
            return await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()


@pytest.fixture
def relay(tmp_path: Path) -> Callable[..., Relay]:
    """Make a relay: `relay(allow=[...], private=[...], table={...})`."""

    def make(**options: Any) -> Relay:
        keys = {key: options.pop(key) for key in ("mode", "allow", "deny", "private") if key in options}
        egress = Egress(**{key: tuple(v) if isinstance(v, list) else v for key, v in keys.items()})
        return Relay(tmp_path / "relay.sock", egress, **options)

    return make


class Upstream:
    """A server on 127.0.0.1."""

    def __init__(self, serve: Serve, tls: ssl.SSLContext | None = None) -> None:
        self.serve, self.tls = serve, tls
        self.port = 0
        self.connections = 0

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self.serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def __aexit__(self, *_: object) -> None:
        self.server.close()


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a coroutine on uvloop, with a bound in time."""

    def runner(coroutine: Coroutine[Any, Any, Any], timeout_s: float = 30) -> Any:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            return loop.run(asyncio.wait_for(coroutine, timeout_s))

    return runner


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """Read a request or response head."""
    return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a certificate and key for `tls.test` with the openssl command."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=tls.test"]
    command += ["-addext", "subjectAltName=DNS:tls.test,DNS:other.test", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


async def until(true: Callable[[], bool]) -> None:
    """Wait until something has become true, at most five seconds."""
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true")


LOOPBACK = {"private": ["127.0.0.1/32"]}
"""Opens loopback for upstreams of these tests."""
LIMITS = Limits(head_timeout_s=0.3, keepalive_timeout_s=0.4, idle_timeout_s=0.6, linger_s=0.3, connect_timeout_s=3)
"""Short limits, for the tests about time."""
