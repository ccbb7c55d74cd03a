"""The egress server of one run: accepts on its Unix socket, and holds what is open.

A connection on that socket *is* the run: there is nothing to authenticate. The first byte says
which protocol a client speaks. Rules can be replaced while connections are open; those that
the new rules do not allow are ended. There is no global state: two servers share nothing.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Collection
from functools import partial
from typing import Protocol

from cloister.egress import denial
from cloister.egress.addresses import Guard
from cloister.egress.decision import Protocol as Spoken
from cloister.egress.decision import Target, Verdict
from cloister.egress.events import EgressEvent
from cloister.egress.hosts import parse_address
from cloister.egress.http1 import HttpError
from cloister.egress.rules import Ruleset
from cloister.egress.socks import VERSION as SOCKS5
from cloister.relay.connection import HttpConnection
from cloister.relay.dial import Dialer, Line
from cloister.relay.exchange import Exchange
from cloister.relay.forward import Forward
from cloister.relay.gate import Gate
from cloister.relay.leaks import REVOKED
from cloister.relay.override import override
from cloister.relay.session import Session, Stats
from cloister.relay.socks import SocksConnection
from cloister.relay.tunnel import Tunnel, as_transport

_MAX_SHOWN = 255
_MAX_TURNED_AWAY = 32
"""Connections beyond the limit that are given an answer at one time; more are closed without one."""
_NO_LINE = Line("")


class Client(Protocol):
    """A client's connection that is not a tunnel (yet)."""

    @property
    def transport(self) -> asyncio.Transport | None:
        """The connection, while it belongs to this client."""

    def sweep(self, now: float) -> None:
        """Enforce the time limits."""


class EgressServer:
    """Serves one run."""

    def __init__(self, session: Session) -> None:
        """Take the run's session; `start` begins to serve."""
        self.session = session
        self.gate = Gate(session)
        self.dialer = Dialer(session, self.gate)
        self.stats = Stats()
        self.turned_away = 0
        self.open_forwards: set[Forward] = set()
        self._clients: set[Client] = set()
        self._tunnels: set[Tunnel] = set()
        self._server: asyncio.AbstractServer | None = None
        self._for_guest: asyncio.AbstractServer | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._drained: asyncio.Future[None] | None = None

    async def start(self, sock: socket.socket) -> None:
        """Serve on a bound Unix socket that the caller made; it is closed by `close`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(partial(_Entry, self), sock=sock)

    async def start_for(self, sock: socket.socket, address: str) -> None:
        """Serve on a listening TCP socket as well, for the one guest of this address; it is closed by `close`."""
        loop = asyncio.get_running_loop()
        self._for_guest = await loop.create_server(partial(_Entry, self, address), sock=sock)

    def update(self, rules: Ruleset, guard: Guard | None = None) -> None:
        """Put new rules in force, also for what is open: connections they do not allow end now."""
        self.gate.update(rules, guard or self.gate.guard)
        for tunnel in list(self._tunnels):
            verdict = self.verdict_now(tunnel.target, tunnel.line)
            if verdict is not None:
                tunnel.cut(verdict)
        for forward in list(self.open_forwards):
            forward.reconsider()

    def revoke(self, credentials: Collection[str]) -> None:
        """End what is open with credentials that were taken back, by name."""
        names = frozenset(credentials)
        for tunnel in list(self._tunnels):
            if not names.isdisjoint(tunnel.credentials):
                tunnel.cut(REVOKED)
        for forward in list(self.open_forwards):
            forward.revoke(names)

    async def close(self) -> None:
        """Stop serving and end everything that is open; each open connection is still recorded."""
        servers = [server for server in (self._server, self._for_guest) if server is not None]
        for server in servers:
            server.close()
        self.gate.close()
        for tunnel in list(self._tunnels):
            tunnel.abort("run-ended")
        for client in list(self._clients):
            if client.transport is not None:
                client.transport.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for server in servers:
            await server.wait_closed()
        if self._clients or self._tunnels:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    # For the connections.

    def verdict_now(self, target: Target, line: Line) -> Verdict | None:
        """Return why an open connection is not allowed by the rules in force, or None."""
        verdict = self.gate.decide(target)
        if verdict.action == "deny":
            return verdict
        address = parse_address(line.address) if line.address else None
        return None if address is None else self.gate.admit(target, address)

    def full(self) -> bool:
        """Whether another connection would be too many."""
        return self.stats.active >= self.session.limits.connections

    def admit_client(self, client: Client) -> None:
        """Watch a connection's time limits."""
        self._clients.add(client)
        if self._sweeper is None:
            self._schedule()

    def forget(self, client: Client) -> None:
        """Stop watching."""
        self._clients.discard(client)

    def left(self, client: Client) -> None:
        """A client is gone."""
        self._clients.discard(client)
        self.stats.active -= 1
        self._check_drained()

    def adopt(self, tunnel: Tunnel, begun: float, status: int) -> None:
        """Hold an open tunnel and record it at its end."""
        clock = time.monotonic()

        def ended(reason: str) -> None:
            self._tunnels.discard(tunnel)
            self.stats.active -= 1
            self._check_drained()
            self.record(
                tunnel.target,
                tunnel.verdict or Verdict("allow", ""),
                ended=reason,
                line=tunnel.line,
                begun=begun,
                duration_s=time.monotonic() - clock,
                status=status,
                up=tunnel.client.count,
                down=tunnel.server.count if tunnel.server else 0,
                ech=tunnel.ech,
                credentials=tunnel.credentials,
            )

        tunnel.on_end = ended
        self._tunnels.add(tunnel)

    def record(  # noqa: PLR0913 - the fields of an event
        self, target: Target | None, verdict: Verdict, *, spelling: str = "", ended: str = "", line: Line = _NO_LINE,
        begun: float = 0.0, duration_s: float = 0.0, status: int = 0, up: int = 0, down: int = 0, ech: bool = False,
        protocol: Spoken = "http", credentials: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Count and record one request, tunnel or refusal."""
        self.stats.denials += verdict.action == "deny"
        self.stats.bytes_up += up
        self.stats.bytes_down += down
        event = EgressEvent(
            time=begun,
            protocol=target.protocol if target else protocol,
            host=target.host.text if target else spelling[:_MAX_SHOWN],
            port=target.port if target else 0,
            verdict=verdict.action,
            reason=ended or verdict.reason,
            method=target.method if target else "",
            path=target.path.split("?", 1)[0] if target else "",
            rule=verdict.rule,
            address=line.address,
            via=line.via,
            status=status,
            ech=ech,
            credentials=credentials,
            bytes_up=up,
            bytes_down=down,
            duration_s=duration_s,
        )
        self.session.record(event)

    def handle(self, exchange: Exchange) -> None:
        """Serve one HTTP request: model traffic names a path of ours, everything else a place in the world."""
        if self.session.models is not None and exchange.method != "CONNECT" and exchange.url.startswith(b"/"):
            self.session.models(exchange)
        else:
            Forward(self, exchange).start()

    def refuse_unreadable(self, _connection: HttpConnection, error: HttpError) -> bytes:
        """Record a request that could not be read and return the answer."""
        verdict = Verdict("deny", error.reason, explanation=error.explanation)
        code = denial.denial_status(error.reason)
        self.record(None, verdict, begun=time.time(), status=code)
        return denial.denial_response(verdict, None, close=True)

    def _check_drained(self) -> None:
        """Tell `close` when the last connection has reported."""
        if self._drained is not None and not self._clients and not self._tunnels and not self._drained.done():
            self._drained.set_result(None)

    def _schedule(self) -> None:
        """Look at the time limits again soon, as long as something is open."""
        limits = self.session.limits
        shortest = min(limits.head_timeout_s, limits.keepalive_timeout_s, limits.idle_timeout_s)
        self._sweeper = asyncio.get_running_loop().call_later(min(max(shortest / 4, 0.02), 5.0), self._sweep)

    def _sweep(self) -> None:
        """Let everything open check its time limits."""
        now = asyncio.get_running_loop().time()
        for client in list(self._clients):
            client.sweep(now)
        for tunnel in list(self._tunnels):
            tunnel.sweep(now, self.session.limits.idle_timeout_s)
        self._sweeper = None
        if self._clients or self._tunnels:
            self._schedule()


class _Entry(asyncio.Protocol):
    """A new connection, until its first byte says which protocol it speaks."""

    def __init__(self, server: EgressServer, peer: str = "") -> None:
        self._server = server
        self._peer = peer
        self._since = asyncio.get_running_loop().time()
        self.transport: asyncio.Transport | None = None
        self._turned_away = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server, self.transport = self._server, as_transport(transport)
        if self._peer and (transport.get_extra_info("peername") or ("",))[0] != self._peer:
            self.transport.abort()  # the packet filter lets nobody else through: it is not there
            self.transport = None
            return
        if server.full():
            verdict = Verdict("deny", "too-many-connections", explanation="this run has too many open connections")
            server.record(None, verdict, begun=time.time(), status=503)
            self._turn_away(self.transport, denial.denial_response(verdict, None, close=True))
            self.transport = None
            return
        server.stats.active += 1
        server.admit_client(self)

    @override
    def data_received(self, data: bytes) -> None:
        transport, server = self.transport, self._server
        if transport is None:
            return
        successor = SocksConnection(server) if data[0] == SOCKS5 else self._http()
        self.transport = None
        server.stats.connections += not isinstance(successor, SocksConnection)  # which counts its requests itself
        server.forget(self)
        server.admit_client(successor)
        transport.set_protocol(successor)
        successor.connection_made(transport)
        successor.data_received(data)

    @override
    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the same for every cause
        if self.transport is not None:
            self._server.left(self)
        if self._turned_away:
            self._server.turned_away -= 1

    def sweep(self, now: float) -> None:
        if self.transport is not None and now - self._since > self._server.session.limits.head_timeout_s:
            self.transport.close()

    def _turn_away(self, transport: asyncio.Transport, answer: bytes) -> None:
        """Answer, and read what the client sends for a moment: closing with unread bytes would lose the answer."""
        if self._server.turned_away >= _MAX_TURNED_AWAY:
            transport.abort()
            return
        self._server.turned_away += 1
        self._turned_away = True
        transport.write(answer)
        transport.write_eof()
        asyncio.get_running_loop().call_later(self._server.session.limits.linger_s, transport.close)

    def _http(self) -> HttpConnection:
        server = self._server
        connection = HttpConnection(server.session.limits, server.handle, server.refuse_unreadable)
        connection.on_lost.append(partial(server.left, connection))
        return connection
