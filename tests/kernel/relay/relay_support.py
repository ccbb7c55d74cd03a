"""The relay on a real Unix socket, servers on loopback, and clients: what the relay tests share."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

from cloister.credentials.certificates import make_authority
from cloister.egress.decision import Target
from cloister.egress.events import EgressEvent
from cloister.egress.http1 import Headers
from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.policy.model import Egress
from cloister.relay.authority import Authority
from cloister.relay.server import EgressServer
from cloister.relay.session import Limits, Session, Swap
from cloister.relay.trust import client_context

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


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """Read a request or response head."""
    return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)


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


def answering(response: bytes, seen: list[bytes] | None = None):
    """Make a server that answers every request head on a connection with the same bytes."""

    async def serve(reader, writer):
        while True:
            head = await read_head(reader)
            if seen is not None:
                seen.append(head)
            writer.write(response)

    return serve


async def curl(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run the real curl."""
    command = ["curl", "-sS", "--max-time", "10", "--noproxy", "", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-1)
    stdout, stderr = await process.communicate()
    return subprocess.CompletedProcess(command, process.returncode or 0, stdout, stderr)


async def bridge(relay, use):
    """Offer the relay's Unix socket on a loopback port, as the forwarder in a sandbox does."""

    async def carry(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def accept(reader, writer):
        inner_reader, inner_writer = await relay.client()
        await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer), return_exceptions=True)
        writer.close()
        inner_writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        await use(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


LOCAL = {"a.test": ["127.0.0.1"], "b.test": ["127.0.0.1"]}


async def echo(reader, writer):
    """Send everything back, and the end as well."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def ended(reader):
    """Read until the other side is gone, however it goes."""
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), 5)


def connect(host: str, port: int) -> bytes:
    """Return a CONNECT request."""
    return f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()


def socks(host: str, port: int) -> bytes:
    """Return a SOCKS5 greeting and request with a name, sent at once."""
    return b"\x05\x01\x00\x05\x01\x00\x03" + bytes([len(host)]) + host.encode() + struct.pack(">H", port)


class FakeBroker:
    """Real secrets of a run, as the relay sees them: one placeholder per host, in any header or the query."""

    def __init__(self, authority: Authority, bound: dict[tuple[str, int], tuple[str, str]]) -> None:
        """Take placeholder and secret by place."""
        self.authority, self.bound = authority, bound
        self.masks: tuple[bytes, ...] = ()
        self.body_limit = 0
        self.bodies: list[bytes] = []
        self.error: Exception | None = None

    def terminates(self, host: str, port: int) -> bool:
        """Say whether something is bound to a place."""
        return (host, port) in self.bound

    def certificate(self, host: str) -> ssl.SSLContext:
        """Return a context of the test's authority."""
        return self.authority.context(host)

    def body_needed(self, _target: Target, _headers: Headers) -> int:
        """Return what the test wants."""
        return self.body_limit

    async def swap(self, target: Target, headers: Headers, body: bytes = b"") -> Swap:
        """Replace the placeholder of the host."""
        if self.error is not None:
            raise self.error
        self.bodies.append(body)
        fake, real = self.bound[target.place]
        swapped = [(name, value.replace(fake.encode(), real.encode())) for name, value in headers]
        used = ("token",) if swapped != headers or fake in target.path else ()
        return Swap(target.path.replace(fake, real), swapped, self.masks, used)

    def leaks(self, data: bytes, place: tuple[str, int] | None = None) -> bool:
        """Look for any placeholder but that of the place."""
        return any(fake.encode() in data for at, (fake, _) in self.bound.items() if at != place)

    @property
    def overlap(self) -> int:
        """Return the longest placeholder, less one byte."""
        return max(len(fake) for fake, _ in self.bound.values()) - 1


class Mitm:
    """An authority for the sandbox, one for the servers, and what a test needs to use both."""

    def __init__(self, folder: Path) -> None:
        """Make both."""
        self.folder = folder
        ours, theirs = make_authority(time.time()), make_authority(time.time())
        self.authority, self.theirs = Authority(ours), theirs
        self.ca, self.server_ca = folder / "ca.pem", folder / "servers.pem"
        self.ca.write_bytes(ours.cert_pem)
        self.server_ca.write_bytes(theirs.cert_pem)

    def server(self, host: str, *alpn: str, clock: float | None = None) -> ssl.SSLContext:
        """Return the context of a server, made at a certain time."""
        context = Authority(self.theirs, lambda: clock or time.time()).context(host)
        context.set_alpn_protocols(list(alpn or ("http/1.1",)))
        return context

    def broker(self, **bound: tuple[str, int]) -> FakeBroker:
        """Bind `cloister-NAME-placeholder` and `real-NAME-secret` to places, by name."""
        fakes = {place: (f"cloister-{name}-placeholder", f"real-{name}-secret") for name, place in bound.items()}
        return FakeBroker(self.authority, fakes)

    def trust(self, http2: bool) -> ssl.SSLContext:
        """Trust the authority of the servers."""
        return client_context(http2, str(self.server_ca))

    def client(self, *alpn: str) -> ssl.SSLContext:
        """Return the context of a client in the sandbox."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.set_alpn_protocols(list(alpn or ("http/1.1",)))
        return context


async def tunnel_tls(relay, host, port, context, *, server_hostname=None):
    """CONNECT through a relay and begin TLS inside."""
    reader, writer = await relay.client()
    writer.write(connect(host, port))
    head = await read_head(reader)
    assert b" 200 " in head, head
    await writer.start_tls(context, server_hostname=server_hostname or host)
    return reader, writer


def terminated(relay, mitm, port, **more):
    """Make a relay whose credential `a` is bound to a.test."""
    options = {"allow": [f"a.test:{port}"], **LOOPBACK, "table": LOCAL, "trust": mitm.trust}
    return relay(**{**options, "broker": mitm.broker(a=("a.test", port)), **more})


def get(port, path="/", *fields):
    """Return a request that carries the placeholder of a.test."""
    lines = [f"GET {path} HTTP/1.1", f"Host: a.test:{port}", "Authorization: Bearer cloister-a-placeholder", *fields]
    return "\r\n".join([*lines, "", ""]).encode()
