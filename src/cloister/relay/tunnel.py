"""Bytes between a client and a server, both ways, after the decision.

Two small protocols, one per side, that write into each other's transport. Reading on one side
stops while the other side's buffer is full, so memory per tunnel is bounded; the end of one
direction is passed on as such (half-close). Until the client's first bytes are judged
(`egress.tunnel`) they are held back; bytes of the server pass, since some servers speak first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from cloister.egress.clienthello import HelloReader
from cloister.egress.decision import Target, Verdict
from cloister.egress.tunnel import ACCESS_DENIED, judge_hello
from cloister.relay.dial import Line
from cloister.relay.override import override
from cloister.relay.splice import BULK, Pump

HIGH_WATER, LOW_WATER = 512 * 1024, 128 * 1024
"""Bytes waiting in one direction at which reading stops and goes on."""
_FLUSH_S, _MAX_FLUSH_S = 0.001, 0.1


def as_transport(transport: asyncio.BaseTransport) -> asyncio.Transport:
    """Return the transport of a stream, its write buffer bounded; uvloop's is no subclass of asyncio's."""
    stream = cast("asyncio.Transport", transport)
    stream.set_write_buffer_limits(HIGH_WATER, LOW_WATER)
    return stream


class Tunnel:
    """One tunnel. `on_end` is called once, with the reason that ended it (empty for an ordinary end)."""

    def __init__(self, target: Target, client: asyncio.Transport, *, inspect: bool = True) -> None:
        """Belong to a client; the server's side is made by `server_side`, the pair is joined by `open`."""
        self.target = target
        self.client = ClientSide(self, client)
        self.server: ServerSide | None = None
        self.verdict: Verdict | None = None
        self.line = Line("")
        self.ech = False
        self.credentials: tuple[str, ...] = ()
        """Names of the credentials that opened it (a WebSocket whose handshake carried a secret)."""
        self.on_end: Callable[[str], None] | None = None
        self._reason = ""
        self.reader = HelloReader() if inspect else None
        self._held = bytearray()
        self._seen = (0, 0.0)

    def server_side(self) -> ServerSide:
        """Make a protocol for one connection attempt."""
        return ServerSide(self)

    def open(self, server: ServerSide, rest: bytes) -> None:
        """Join both sides; `rest` are bytes the client sent ahead."""
        self.server = server
        server.peer = self.client.transport
        self.client.peer = server.transport
        self.client.transport.set_protocol(self.client)
        server.release()
        if rest:
            self.client.data_received(rest)
        if not self.client.lost and not server.lost:
            self.client.transport.resume_reading()
        elif server.lost:
            self.end("")

    def inspect(self, data: bytes) -> None:
        """Collect the client's first bytes, then let them through or cut the tunnel."""
        assert self.reader is not None  # noqa: S101 - only called while there is one
        self._held += data
        hello = self.reader.feed(data)
        if hello is None:
            return
        self.reader, self.ech = None, hello.ech
        denial = judge_hello(self.target, hello)
        if denial is not None:
            self._refuse(denial, alert=hello.kind == "tls")
        elif self.client.peer is not None:
            self.client.peer.write(bytes(self._held))
        self._held.clear()

    def _refuse(self, verdict: Verdict, *, alert: bool) -> None:
        """End the tunnel before a byte has reached the server; a TLS client is told in its own language."""
        self.verdict = verdict
        if alert:
            self.client.transport.write(ACCESS_DENIED)
        if self.server is not None:
            self.server.transport.abort()
        self.end(verdict.reason)

    def cut(self, verdict: Verdict) -> None:
        """End the tunnel because it is not allowed (any more); nothing more is delivered."""
        self.verdict = verdict
        self.abort(verdict.reason)

    def end(self, reason: str) -> None:
        """Close both sides once what is buffered has been delivered."""
        self._reason = self._reason or reason
        self._stop_pumps()
        self.client.transport.close()
        if self.server is not None:
            self.server.transport.close()

    def abort(self, reason: str) -> None:
        """Close both sides at once."""
        self._reason = self._reason or reason
        self._stop_pumps()
        self.client.transport.abort()
        if self.server is not None:
            self.server.transport.abort()

    def other(self, side: _Side) -> _Side | None:
        """Return the opposite side."""
        return self.server if side is self.client else self.client

    def _stop_pumps(self) -> None:
        """Close the pumps: nothing is in their pipes unless the tunnel is broken off."""
        self.client.stop_pump()
        if self.server is not None:
            self.server.stop_pump()

    def side_lost(self, error: Exception | None) -> None:
        """End with either side, and report when both are gone."""
        if self.server is None:
            return
        self.end("connection-reset" if isinstance(error, ConnectionError) else "")
        if self.client.lost and self.server.lost and self.on_end is not None:
            report, self.on_end = self.on_end, None
            report(self._reason)

    def sweep(self, now: float, idle_s: float) -> None:
        """End the tunnel when no byte has moved for too long."""
        moved = self.client.count + (self.server.count if self.server else 0)
        if moved != self._seen[0] or not self._seen[1]:
            self._seen = (moved, now)
        elif now - self._seen[1] > idle_s:
            self.abort("idle-timeout")


class _Side(asyncio.Protocol):
    """What both sides share: pass data, pressure and ends to the peer."""

    __slots__ = ("_pump", "_tried", "bulk", "count", "ended", "lost", "peer", "transport", "tunnel")

    def __init__(self, tunnel: Tunnel) -> None:
        self.tunnel = tunnel
        self.peer: asyncio.Transport | None = None
        self.count = 0
        self.ended = False
        self.lost = False
        self.bulk = False
        """Whether this side's bytes go through a pump, or are about to."""
        self._tried = False
        self._pump: Pump | None = None

    transport: asyncio.Transport

    @override
    def pause_writing(self) -> None:
        if self.peer is not None:
            self.peer.pause_reading()

    @override
    def resume_writing(self) -> None:
        other = self.tunnel.other(self)
        if self.peer is not None and not self.peer.is_closing() and other is not None and not other.bulk:
            self.peer.resume_reading()

    @override
    def eof_received(self) -> bool:
        """Pass the end of this direction on; the other one stays open until it ends too."""
        self.ended = True
        server = self.tunnel.server
        if self.tunnel.reader is not None and self is self.tunnel.client:
            self.tunnel.end("")  # nothing was let through yet, nothing will be
        elif server is not None and self.tunnel.client.ended and server.ended:
            self.tunnel.end("")
        elif self.peer is not None and not self.peer.is_closing():
            self.peer.write_eof()
        return True

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.stop_pump()
        self.tunnel.side_lost(exc)

    def forward(self, data: bytes) -> None:
        """Write to the peer; a direction that carries much is handed to a pump."""
        if self.peer is None:
            return
        self.peer.write(data)
        if self.count > BULK and not self._tried:
            self._tried = self.bulk = True
            self.transport.pause_reading()
            self._begin_pump(_FLUSH_S)

    def stop_pump(self) -> None:
        """Close the pump, if there is one."""
        if self._pump is not None:
            self._pump.close()

    def _begin_pump(self, pause_s: float) -> None:
        """Start the pump once everything written so far has left; go on without one when that fails."""
        if self.lost or self.peer is None or self.peer.is_closing() or self.transport.is_closing():
            return
        loop = asyncio.get_running_loop()
        if self.peer.get_write_buffer_size():
            loop.call_later(pause_s, self._begin_pump, min(2 * pause_s, _MAX_FLUSH_S))
            return
        sockets = [side.get_extra_info("socket") for side in (self.transport, self.peer)]
        try:
            if None in sockets:
                raise OSError  # noqa: TRY301 - TLS ends here: the kernel cannot carry these bytes
            source, sink = (sock.fileno() for sock in sockets)
            self._pump = Pump(source, sink, self._pumped, self._pump_ended)
        except OSError:
            self.bulk = False
            self.transport.resume_reading()
            return
        self._pump.start()

    def _pumped(self, size: int) -> None:
        """Count."""
        self.count += size

    def _pump_ended(self, error: OSError | None) -> None:
        """Pass an end on, as if the transport had seen it."""
        if error is None:
            self.eof_received()
        else:
            self.tunnel.abort("connection-reset")


class ClientSide(_Side):
    """The side of the sandbox."""

    def __init__(self, tunnel: Tunnel, transport: asyncio.Transport) -> None:
        """Take over an accepted connection."""
        super().__init__(tunnel)
        self.transport = transport

    @override
    def data_received(self, data: bytes) -> None:
        """Write to the server, once the first bytes have been judged."""
        self.count += len(data)
        if self.tunnel.reader is not None:
            self.tunnel.inspect(data)
        else:
            self.forward(data)


class ServerSide(_Side):
    """The side of the server. Until the tunnel is open its bytes wait (at most one read, then reading stops)."""

    def __init__(self, tunnel: Tunnel) -> None:
        """Wait for the connection."""
        super().__init__(tunnel)
        self._early: list[bytes] = []

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Bound the buffer."""
        self.transport = as_transport(transport)

    @override
    def data_received(self, data: bytes) -> None:
        """Write to the client."""
        self.count += len(data)
        if self.peer is None:
            self._early.append(data)
            self.transport.pause_reading()
        else:
            self.forward(data)

    def release(self) -> None:
        """Deliver what came before the tunnel was open."""
        for data in self._early:
            self.transport.resume_reading()
            if self.peer is not None:
                self.peer.write(data)
        self._early.clear()
        if self.ended and self.peer is not None:
            self.peer.write_eof()

    @override
    def eof_received(self) -> bool:
        """Remember an end that comes before the tunnel is open."""
        if self.peer is None:
            self.ended = True
            return True
        return super().eof_received()
