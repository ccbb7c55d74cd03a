"""Connections to the server behind one client connection, kept for that client's next requests.

Nothing here is shared between clients, let alone runs. A lane carries one request: a connection
that speaks HTTP/1.1, or a stream of one that speaks HTTP/2, which is offered only when the
client speaks it too. The host's certificate is verified before a byte of a request is written.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cloister.egress import http1
from cloister.egress.decision import Target
from cloister.egress.http1 import Body, Headers, RequestLine
from cloister.relay.dial import Line
from cloister.relay.override import override
from cloister.relay.session import failed
from cloister.relay.tls import TlsError, TlsLayer
from cloister.relay.upstream import HttpUpstream

if TYPE_CHECKING:
    from cloister.relay.h2_client import H2Client, H2Lane
    from cloister.relay.server import EgressServer

_MAX_IDLE = 8


class Outgoing(NamedTuple):
    """A request head as it leaves, secrets included. Never printed."""

    method: str
    line: RequestLine
    headers: Headers
    body: Body
    websocket: bool = False
    trailers: bool = False
    """The client takes trailers (`te: trailers`), which servers of gRPC insist on."""

    @override
    def __repr__(self) -> str:
        """Show nothing of it."""
        return "Outgoing(...)"

    def encode(self) -> bytes:
        """Write it for HTTP/1.1."""
        return http1.request_head(self.method, self.line, self.headers, self.body, websocket=self.websocket)


class Lane(Protocol):
    """Carries one request and its response."""

    used: bool
    """Whether its connection has carried another request before."""
    reusable: bool

    def write_body(self, data: bytes) -> None:
        """Send a piece of the body."""

    def end_body(self, trailers: Headers) -> None:
        """Send the end of the body."""

    def pause(self, paused: bool) -> None:
        """Stop or go on reading the response."""

    def close(self) -> None:
        """Give up; nobody waits for a response any more."""

    def release(self) -> asyncio.Transport | None:
        """Give the transport away (WebSocket)."""


class Found(NamedTuple):
    """A lane, and the address it leads to."""

    lane: HttpUpstream | H2Lane
    line: Line


class Lanes:
    """The connections to one server for one client connection."""

    def __init__(self, server: EgressServer, *, http2: bool) -> None:
        """Offer HTTP/2 to the server only where the client speaks it."""
        self._server, self._http2 = server, http2
        self._plain = not http2  # the server speaks HTTP/1.1
        self._first = asyncio.Lock()
        self._kept: list[tuple[HttpUpstream, Line]] = []
        self._shared: tuple[H2Client, Line] | None = None
        self._closed = False

    async def find(self, target: Target) -> Found:
        """Return a lane: a kept one, or one over a new connection.

        Raises:
            RefusedError: when the server cannot be reached, or its certificate is not valid for the host.
        """
        found = self._ready()
        if found is not None:
            return found
        if self._each_its_own():
            return await self._dial(target)
        async with self._first:  # many first requests at a time need one connection, if it turns out to be HTTP/2
            found = self._ready()
            if found is None and not self._each_its_own():
                found = await self._dial(target)
        return found if found is not None else await self._dial(target)

    def close(self) -> None:
        """Close everything; the client is gone."""
        self._closed = True
        for upstream, _ in self._kept:
            upstream.close()
        self._kept.clear()
        if self._shared is not None:
            self._shared[0].close()
            self._shared = None

    def _each_its_own(self) -> bool:
        """Say whether every request under way needs a connection of its own."""
        return self._plain

    def _ready(self) -> Found | None:
        """Return a lane over a connection that stands."""
        if self._shared is not None:
            client, line = self._shared
            if client.usable:
                return Found(client.stream(), line)
            if client.finished:
                self._shared = None
        self._kept = [(upstream, line) for upstream, line in self._kept if upstream.transport is not None]
        for upstream, line in self._kept:
            if upstream.idle:
                return Found(upstream, line)
        return None

    async def _dial(self, target: Target) -> Found:
        """Connect and shake hands."""
        context = self._server.session.trust(self._http2)

        def layer() -> TlsLayer:
            return TlsLayer(context, _choose, server_side=False, host=target.host.text)

        tls, line = await self._server.dialer.dial(target, layer)
        try:
            async with asyncio.timeout(self._server.session.limits.connect_timeout_s):
                protocol = await tls.ready
        except TlsError as error:
            reason = "certificate-invalid" if error.certificate else "tls-failed"
            raise failed(reason, f"{target.authority}: {error}") from None
        except TimeoutError:
            tls.transport.abort()
            raise failed("connect-timeout", f"{target.authority} did not finish the TLS handshake") from None
        except BaseException:
            tls.transport.abort()
            raise
        if self._closed:
            tls.transport.abort()
        if isinstance(protocol, HttpUpstream):
            self._plain = True
            self._trim()
            self._kept.append((protocol, line))
            return Found(protocol, line)
        return self._share(protocol, line)

    def _share(self, protocol: asyncio.Protocol, line: Line) -> Found:
        """Keep a connection that speaks HTTP/2 for all further requests."""
        from cloister.relay.h2_client import H2Client

        assert isinstance(protocol, H2Client)  # noqa: S101 - _choose makes two kinds
        self._shared = (protocol, line)
        return Found(protocol.stream(), line)

    def _trim(self) -> None:
        """Close idle connections beyond a few."""
        idle = [kept for kept in self._kept if kept[0].idle]
        for kept in idle[_MAX_IDLE:]:
            kept[0].close()
            self._kept.remove(kept)


def _choose(alpn: str) -> asyncio.Protocol:
    """Make what speaks to the server."""
    if alpn == "h2":
        from cloister.relay.h2_client import H2Client

        return H2Client()
    return HttpUpstream()
