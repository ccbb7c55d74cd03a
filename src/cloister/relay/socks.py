"""A client that speaks SOCKS5: handshake, the same decision as everyone, then a tunnel."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from cloister.egress import socks
from cloister.egress.decision import Target, Verdict
from cloister.egress.denial import socks_reply_code
from cloister.egress.hosts import HostError, parse_host
from cloister.relay.override import override
from cloister.relay.session import RefusedError
from cloister.relay.tunnel import Tunnel, as_transport

if TYPE_CHECKING:
    from cloister.relay.server import EgressServer


class SocksConnection(asyncio.Protocol):
    """One connection, until it is a tunnel or refused."""

    transport: asyncio.Transport

    def __init__(self, server: EgressServer) -> None:
        """Wait for the greeting."""
        self._server = server
        self._data = bytearray()
        self._greeted = self._over = False
        self._task: asyncio.Task[None] | None = None
        self._begun, self._clock = time.time(), asyncio.get_running_loop().time()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Bound the buffer."""
        self.transport = as_transport(transport)

    @override
    def data_received(self, data: bytes) -> None:
        """Collect the two messages."""
        if self._over:
            return
        self._data += data
        if self._task is not None:
            return  # sent ahead of our reply: kept for the tunnel, and reading has stopped
        try:
            self._step()
        except socks.SocksError as error:
            self._refuse(None, Verdict("deny", "bad-request", explanation=error.explanation), reply=error.reply)

    @override
    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the same for every cause
        """Stop working for a client that is gone."""
        self._over = True
        self._server.left(self)
        if self._task is not None:
            self._task.cancel()

    def sweep(self, now: float) -> None:
        """Enforce the time limit of the handshake."""
        if self._task is None and now - self._clock > self._server.session.limits.head_timeout_s:
            self.transport.close()

    def _step(self) -> None:
        """Take the next complete message from the buffer."""
        if not self._greeted:
            size = socks.parse_greeting(self._data)
            if size is None:
                return
            del self._data[:size]
            self._greeted = True
            self.transport.write(socks.NO_AUTHENTICATION)
        request = socks.parse_request(self._data)
        if request is None:
            return
        self._server.stats.connections += 1
        del self._data[: request.size]
        try:
            host, broker = parse_host(request.host), self._server.session.broker
            inspected = broker is not None and broker.terminates(host.text, request.port)
            target = Target("socks5", host, request.port, inspected=inspected)
        except HostError as error:
            verdict = Verdict("deny", "host-invalid", explanation=error.explanation)
            self._refuse(None, verdict, spelling=request.host)
            return
        self.transport.pause_reading()
        self._task = asyncio.get_running_loop().create_task(self._go(target))

    async def _go(self, target: Target) -> None:
        """Decide, connect, open the tunnel."""
        server, tunnel = self._server, Tunnel(target, self.transport)
        try:
            verdict = await server.gate.permit(target)
            if not verdict.allowed:
                self._refuse(target, verdict)
                return
            if target.inspected:
                self._terminate(target, verdict)
                return
            side, line = await server.dialer.dial(target, tunnel.server_side)
        except RefusedError as error:
            self._refuse(target, error.verdict)
            return
        except asyncio.CancelledError:
            self._record(target, Verdict("deny", "client-closed"))
            raise
        except Exception:
            self.transport.abort()
            raise
        late = server.verdict_now(target, line)
        if late is not None or self._over:
            side.transport.abort()
            self._refuse(target, late or verdict)
            return
        self.transport.write(socks.reply(socks.SUCCEEDED))
        tunnel.verdict, tunnel.line = verdict, line
        server.forget(self)
        server.adopt(tunnel, self._begun, 0)
        tunnel.open(side, bytes(self._data))

    def _terminate(self, target: Target, verdict: Verdict) -> None:
        """End the client's TLS here."""
        from cloister.relay.terminate import Termination

        server, broker = self._server, self._server.session.broker
        if self._over or broker is None:
            return
        self._over = True
        self.transport.write(socks.reply(socks.SUCCEEDED))
        server.forget(self)
        Termination(server, broker, target, verdict).open(self.transport, bytes(self._data))

    def _refuse(
        self, target: Target | None, verdict: Verdict, *, reply: bytes | None = None, spelling: str = ""
    ) -> None:
        """Send the reply and close."""
        if self._over:
            return
        self._over = True
        self._record(target, verdict, spelling=spelling)
        self.transport.write(socks.reply(socks_reply_code(verdict.reason)) if reply is None else reply)
        self.transport.close()

    def _record(self, target: Target | None, verdict: Verdict, spelling: str = "") -> None:
        """Write the event of a connection that became no tunnel."""
        duration_s = asyncio.get_running_loop().time() - self._clock
        self._server.record(
            target, verdict, spelling=spelling, protocol="socks5", begun=self._begun, duration_s=duration_s
        )
