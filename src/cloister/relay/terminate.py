"""A client's connection whose TLS ends here: the hello is judged, TLS begins, requests come out of it.

The tunnel was allowed for one host. TLS inside must ask for that host, as in every tunnel, and
each request inside must name it and is decided on its own (`inspected`). The server is dialled
with the first request that may go there. Encrypted Client Hello is never accepted: the client is
served for the outer name, which was checked, and requests for another host are refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from cloister.egress import denial
from cloister.egress.clienthello import HelloReader
from cloister.egress.decision import Target, Verdict
from cloister.egress.http1 import HttpError
from cloister.egress.tunnel import ACCESS_DENIED, judge_hello
from cloister.relay.connection import HttpConnection
from cloister.relay.dial import Line
from cloister.relay.exchange import Exchange
from cloister.relay.inspected import Inspected
from cloister.relay.lanes import Lanes
from cloister.relay.override import override
from cloister.relay.session import Broker
from cloister.relay.tls import TlsLayer

if TYPE_CHECKING:
    from cloister.relay.h2_server import H2Connection
    from cloister.relay.server import EgressServer


class Inner(Protocol):
    """What HTTP/1.1 and HTTP/2 inside have in common."""

    on_lost: list[Callable[[], None]]

    def sweep(self, now: float) -> None:
        """Enforce the time limits."""


class Termination(asyncio.Protocol):
    """One such connection. It is the outer transport's protocol until TLS takes over."""

    def __init__(self, server: EgressServer, broker: Broker, target: Target, verdict: Verdict) -> None:
        """Belong to a tunnel that was allowed; `open` begins."""
        self.server, self.target, self.verdict = server, target, verdict
        self.transport: asyncio.Transport | None = None
        self.lanes: Lanes | None = None
        self.ech = False
        self.requests = 0
        self._broker = broker
        self._reader = HelloReader()
        self._held = bytearray()
        self._layer: TlsLayer | None = None
        self._inner: Inner | None = None
        self._begun, self._clock = time.time(), time.monotonic()
        self._since = asyncio.get_running_loop().time()
        self._reason = ""

    def open(self, transport: asyncio.Transport, ahead: bytes) -> None:
        """Take the client's connection over, with bytes it sent ahead."""
        self.transport = transport
        self.server.admit_client(self)
        transport.set_protocol(self)
        if ahead:
            self.data_received(ahead)
        if not transport.is_closing():
            transport.resume_reading()

    @override
    def data_received(self, data: bytes) -> None:
        """Collect the hello."""
        self._held += data
        hello = self._reader.feed(data)
        transport = self.transport
        if hello is None or transport is None:
            return
        self.ech = hello.ech
        denied = judge_hello(self.target, hello)
        if hello.kind == "not-tls":
            why = "a credential is bound to this host, so only TLS is carried there"
            denied = Verdict("deny", "not-tls", explanation=why)
        if denied is not None:
            self.verdict = denied
            if hello.kind == "tls":
                transport.write(ACCESS_DENIED)
            transport.close()
            return
        self._begin(transport)

    @override
    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the same for every cause
        """The client is gone before TLS began, or was cut."""
        self._lost()

    def sweep(self, now: float) -> None:
        """Enforce the time limits: those of a head for the handshake, then those of HTTP."""
        if self._inner is not None:
            self._inner.sweep(now)
        elif now - self._since > self.server.session.limits.head_timeout_s and self.transport is not None:
            self._reason = "request-timeout"
            self.transport.abort()

    def forget(self) -> None:
        """The connection has become a tunnel (WebSocket), which is held and recorded as such."""
        self.server.forget(self)
        if self.lanes is not None:
            self.lanes.close()

    # Inside.

    def _begin(self, transport: asyncio.Transport) -> None:
        """Put TLS between the transport and HTTP."""
        try:
            context = self._broker.certificate(self.target.host.text)
        except Exception:
            self._reason = "internal-error"
            transport.abort()
            raise
        self._layer = layer = TlsLayer(context, self._choose, server_side=True)
        layer.ready.add_done_callback(self._shaken)
        transport.set_protocol(layer)
        layer.connection_made(transport)
        held = bytes(self._held)
        self._held.clear()
        layer.data_received(held)

    def _choose(self, alpn: str) -> asyncio.Protocol:
        """Make what reads the requests."""
        http2 = alpn == "h2"
        self.lanes = Lanes(self.server, http2=http2)
        inner = self._http2() if http2 else HttpConnection(self.server.session.limits, self._handle, self._refuse)
        inner.on_lost.append(self._lost)
        self._inner = inner
        return inner

    def _http2(self) -> H2Connection:
        """Make the reader of HTTP/2; its library is imported with the first client that speaks it."""
        from cloister.relay.h2_server import H2Connection

        return H2Connection(self.server.session.limits, self._handle, self._refused)

    def _handle(self, exchange: Exchange) -> None:
        """Serve one request."""
        self.requests += 1
        Inspected(self.server, exchange, self, self._broker).start()

    def _refuse(self, _connection: HttpConnection, error: HttpError) -> bytes:
        """Record a request that cannot be read, and return the answer."""
        return denial.denial_response(self._refused(error), self.target, close=True)

    def _refused(self, error: HttpError) -> Verdict:
        """Record a request that cannot be read."""
        self.requests += 1
        verdict = Verdict("deny", error.reason, explanation=error.explanation)
        target = Target("https", self.target.host, self.target.port)
        self.server.record(target, verdict, begun=time.time(), status=denial.denial_status(error.reason))
        return verdict

    def _shaken(self, ready: asyncio.Future[asyncio.Protocol]) -> None:
        """Note a handshake that failed: the client does not trust us, or speaks nothing we speak."""
        if not ready.cancelled() and ready.exception() is not None:
            self._reason = self._reason or "tls-failed"
            self._lost()

    def _lost(self) -> None:
        """The client is gone."""
        if self.transport is None:
            return
        self.transport = None
        if self.lanes is not None:
            self.lanes.close()
        if not self.requests:
            self.server.record(
                self.target, self.verdict, ended=self._reason if self.verdict.allowed else "", line=Line(""),
                begun=self._begun, duration_s=time.monotonic() - self._clock, ech=self.ech,
            )  # fmt: skip
        self.server.left(self)
