"""What happens to one HTTP request of a client: status page, CONNECT, or forwarding to a server.

Each request of a kept connection is decided anew; a connection to a server is used again only
by the same client for the same target. This module joins an `Exchange` with an `HttpUpstream`
or a `Tunnel` and writes the event; it parses nothing itself.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import msgspec

from cloister.egress import denial, http1, status
from cloister.egress.decision import Target, Verdict
from cloister.egress.hosts import PROXY_NAME, Host
from cloister.egress.http1 import Body, Headers, HttpError, RequestLine
from cloister.relay.dial import Line
from cloister.relay.exchange import Exchange
from cloister.relay.leaks import HOLD_S, MISDIRECTED, REVOKED, Watch
from cloister.relay.session import RefusedError
from cloister.relay.tunnel import ServerSide, Tunnel
from cloister.relay.upstream import HttpUpstream

if TYPE_CHECKING:
    from cloister.relay.lanes import Lane
    from cloister.relay.server import EgressServer

_FIRST_ANSWER = b"HTTP/1.1 200 Connection established\r\n\r\n"


class Forward:
    """One request on its way. It is the exchange's sink, by way of the upstream, and the upstream's receiver."""

    def __init__(self, server: EgressServer, exchange: Exchange) -> None:
        """Take a request; `start` begins."""
        self.server, self.exchange = server, exchange
        self.target: Target | None = None
        self.verdict = Verdict("deny", "bad-request")
        self.line = Line("")
        self._flusher: asyncio.TimerHandle | None = None
        self._request = RequestLine(Host(""), 0, "")
        self._upstream: Lane | None = None
        self._watch: Watch | None = None
        self._used: tuple[str, ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._begun = time.time()
        self._clock = time.monotonic()
        self._answered = self._over = False

    def start(self) -> None:
        """Read the target, decide, and go on at once where nothing has to be waited for."""
        exchange = self.exchange
        verdict = self._judge()
        if self.target is None or verdict.action == "deny":
            self._refuse(verdict)
            return
        if self.target.host.text == PROXY_NAME and self.target.protocol == "http":
            self._answer_status(verdict)
            return
        kept = exchange.connection.upstream
        if verdict.allowed and isinstance(kept, _Kept) and kept.fits(self.target) and exchange.method != "CONNECT":
            self.verdict, self.line = verdict, kept.line
            self._send(kept.upstream)
            return
        self._spawn()

    def _judge(self) -> Verdict:
        """Decide about the request without asking; one that cannot be read is refused, and is the client's last."""
        try:
            self.target = self._read_target()
        except HttpError as error:
            self.exchange.keep_alive = False
            return Verdict("deny", error.reason, explanation=error.explanation)
        broker = self.server.session.broker
        if broker is not None and broker.leaks(self._leaving()):
            return MISDIRECTED
        return self.server.gate.decide(self.target)

    def reconsider(self) -> None:
        """The policy has changed: end this request if it would not be allowed now."""
        if self.target is None or self._over or self._upstream is None:
            return
        verdict = self.server.verdict_now(self.target, self.line)
        if verdict is not None:
            self._end_for(verdict)

    def revoke(self, credentials: frozenset[str]) -> None:
        """Credentials were taken back: end this request if it was sent with one of them."""
        if not self._over and not credentials.isdisjoint(self._used):
            self._end_for(REVOKED)

    def _end_for(self, verdict: Verdict) -> None:
        """Break the request off."""
        self.verdict = verdict
        if self._upstream is not None:
            self._upstream.close()
        self._broken_off(HttpError(verdict.reason, verdict.explanation))

    # The exchange's sink.

    def write_body(self, data: bytes) -> None:
        """Pass a piece of the request body on."""
        if self._upstream is None:
            return
        if self._watch is None:
            self._upstream.write_body(data)
            return
        safe = self._watch.feed(data)
        if self._watch.broken:
            self._leaked()
        elif safe:
            self._upstream.write_body(safe)
        if self._watch.holds and self._flusher is None:
            self._flusher = self.exchange.connection.loop.call_later(HOLD_S, self._flush)

    def end_body(self, trailers: Headers) -> None:
        """Pass the end of the request body on."""
        broker = self.server.session.broker
        if trailers and broker is not None and broker.leaks(http1.last_chunk(trailers)):
            self._leaked()
        self._flush()
        if self._upstream is not None:
            self._upstream.end_body(trailers)

    def abandon(self) -> None:
        """The client is gone."""
        if self._upstream is not None:
            self._upstream.close()
        self._record("client-closed")

    # The upstream's receiver.

    def on_interim(self, code: int, phrase: bytes, headers: Headers) -> None:
        """Pass a 1xx response on."""
        self.exchange.interim(code, phrase, headers)

    def on_response(self, code: int, phrase: bytes, headers: Headers, body: Body) -> None:
        """Pass the head on."""
        self._answered = True
        self.exchange.respond(code, phrase, headers, body)

    def on_response_body(self, data: bytes) -> None:
        """Pass a piece of the response body on."""
        self.exchange.respond_body(data)

    def on_response_end(self, trailers: Headers) -> None:
        """Finish; keep the connection for the client's next request if it can be kept."""
        upstream, self._upstream = self._upstream, None
        if upstream is not None and not upstream.reusable:
            upstream.close()
        self._record("")
        self.exchange.respond_end(trailers)

    def on_switch(self, phrase: bytes, headers: Headers, rest: bytes) -> None:
        """Turn both connections into a tunnel (WebSocket)."""
        connection, upstream = self.exchange.connection, self._upstream
        head = http1.ResponseHead(101, phrase, headers, Body("none"), websocket=True)
        connection.write(head.encode())
        client, ahead = connection.release()
        transport = upstream.release() if upstream else None
        self._leave()
        if client is None or transport is None or self.target is None:
            if transport is not None:
                transport.abort()
            self._record("client-closed")
            return
        self._over = True
        self.exchange.status = 101
        tunnel = Tunnel(self.target, client, inspect=False)
        tunnel.credentials = self._used
        side = ServerSide(tunnel)
        side.connection_made(transport)
        transport.set_protocol(side)
        self._open(tunnel, side, ahead)
        if rest:
            side.data_received(rest)

    def _leave(self) -> None:
        """The client's connection becomes a tunnel."""
        self.server.forget(self.exchange.connection)

    def on_failure(self, error: HttpError) -> None:
        """Answer for a server that did not, or break off what it began.

        A kept connection that the server closed in the meantime is no failure: a request that
        has no body, and to which no byte was answered, is sent again on a new connection.
        """
        upstream, self._upstream = self._upstream, None
        if upstream is not None and upstream.used and not self._answered and self.exchange.replayable:
            self.exchange.detach()
            self._spawn()
            return
        self._broken_off(error)

    def on_pressure(self, *, paused: bool) -> None:
        """The server reads slowly: so does the client's body."""
        self.exchange.pause_upload(paused=paused)

    # Inside.

    def _read_target(self) -> Target:
        """Return where the request wants to go."""
        exchange = self.exchange
        if exchange.method == "CONNECT":
            exchange.keep_alive = False
            host, port = http1.parse_connect(exchange.url)
            broker = self.server.session.broker
            inspected = broker is not None and broker.terminates(host.text, port)
            return Target("connect", host, port, inspected=inspected)
        if sum(name.lower() == b"host" for name, _ in exchange.headers) > 1:
            raise HttpError("bad-request", "the request has more than one Host field")
        self._request = http1.parse_absolute(exchange.method, exchange.url)
        line = self._request
        return Target("http", line.host, line.port, exchange.method, line.target)

    def _answer_status(self, verdict: Verdict) -> None:
        """Tell the agent what it may reach."""
        self.verdict = verdict
        body = status.status_body(self.server.session.run, self.server.gate.rules)
        head_only, keep = self.exchange.method == "HEAD", self.exchange.keep_alive and self.exchange.ended
        self._record("", code=200)
        self.exchange.respond_whole(200, denial.json_response(200, body, head_only=head_only, close=not keep))

    def _leaving(self) -> bytes:
        """Return what of the head would leave: a tunnel passes on no more than its host."""
        exchange = self.exchange
        if exchange.method == "CONNECT":
            return exchange.url
        return http1.request_head(exchange.method, self._request, exchange.headers, exchange.body)

    def _flush(self) -> None:
        """Pass on what waited for the rest of a placeholder."""
        if self._flusher is not None:
            self._flusher.cancel()
            self._flusher = None
        if self._watch is not None and self._upstream is not None and not self._over:
            held = self._watch.flush()
            if held:
                self._upstream.write_body(held)

    def _leaked(self) -> None:
        """Break the request off: its body holds a placeholder."""
        upstream, self._upstream = self._upstream, None
        if upstream is None:
            return
        upstream.close()
        self.verdict = MISDIRECTED
        self._broken_off(HttpError(MISDIRECTED.reason, MISDIRECTED.explanation))

    def _spawn(self) -> None:
        """Go on in a task that ends with the client."""
        self._task = self.exchange.connection.loop.create_task(self._go())
        self.exchange.on_abandon = self._task.cancel

    async def _go(self) -> None:
        """Ask where needed, connect, and go on."""
        target, exchange = self.target, self.exchange
        if target is None:
            return
        try:
            verdict = await self.server.gate.permit(target)
            if not verdict.allowed:
                self._refuse(verdict)
                return
            self.verdict = verdict
            if exchange.method == "CONNECT":
                await self._connect(target)
                return
            upstream, self.line = await self.server.dialer.dial(target, HttpUpstream)
        except RefusedError as error:
            self._refuse(error.verdict)
            return
        except asyncio.CancelledError:
            self._record("client-closed")
            raise
        except Exception:
            self._record("internal-error")
            exchange.fail()
            raise
        late = self.server.verdict_now(target, self.line)
        if late is not None or exchange.connection.transport is None:
            upstream.close()
            self._refuse(late or self.verdict)
            return
        self._keep(upstream, target)
        self._send(upstream)

    def _keep(self, upstream: HttpUpstream, target: Target) -> None:
        """Remember the connection for the client's next request, in place of the one before."""
        connection = self.exchange.connection
        if isinstance(connection.upstream, _Kept):
            connection.upstream.upstream.close()
        else:
            connection.on_lost.append(lambda: _close_kept(connection.upstream))
        connection.upstream = _Kept(upstream, target.place, self.line)

    def _send(self, upstream: HttpUpstream) -> None:
        """Send the request to its server."""
        exchange, self._upstream = self.exchange, upstream
        head = http1.request_head(
            exchange.method, self._request, exchange.headers, exchange.body, websocket=exchange.websocket
        )
        exchange.bytes_up += len(head)
        broker = self.server.session.broker
        self._watch = None if broker is None else Watch(broker)
        upstream.begin(self, exchange.method, head, exchange.body, websocket=exchange.websocket)
        self.server.open_forwards.add(self)
        exchange.connection.on_pressure(upstream.pause)
        exchange.attach(self)

    async def _connect(self, target: Target) -> None:
        """Open a tunnel for CONNECT."""
        connection = self.exchange.connection
        if connection.transport is None:
            return
        if target.inspected:
            self._terminate(target)
            return
        tunnel = Tunnel(target, connection.transport)
        side, self.line = await self.server.dialer.dial(target, tunnel.server_side)
        late = self.server.verdict_now(target, self.line)
        if late is not None:
            side.transport.abort()
            self._refuse(late)
            return
        connection.write(_FIRST_ANSWER)
        client, ahead = connection.release()
        self.server.forget(connection)
        if client is None:
            side.transport.abort()
            self._record("client-closed")
            return
        self._over = True
        self._open(tunnel, side, ahead)

    def _terminate(self, target: Target) -> None:
        """End the client's TLS here."""
        from cloister.relay.terminate import Termination

        connection, broker = self.exchange.connection, self.server.session.broker
        connection.write(_FIRST_ANSWER)
        client, ahead = connection.release()
        self.server.forget(connection)
        self._over = True
        if client is not None and broker is not None:
            Termination(self.server, broker, target, self.verdict).open(client, ahead)

    def _open(self, tunnel: Tunnel, side: ServerSide, ahead: bytes) -> None:
        """Let the bytes flow and record the tunnel at its end."""
        tunnel.line, tunnel.verdict = self.line, self.verdict
        self.server.adopt(tunnel, self._begun, self.exchange.status)
        tunnel.open(side, ahead)

    def _refuse(self, verdict: Verdict) -> None:
        """Answer with the verdict."""
        self.verdict = verdict
        exchange = self.exchange
        if exchange.connection.transport is None:
            self._record("client-closed")
            return
        code = denial.denial_status(verdict.reason)
        self._record("", code=code)
        exchange.respond_message(code, denial.denial_headers(verdict.reason), denial.denial_body(verdict, self.target))

    def _broken_off(self, error: HttpError) -> None:
        """No complete response will come: say so if nothing was written yet, break off otherwise."""
        if self.exchange.started:
            self._record(error.reason)
            self.exchange.fail()
        else:
            remedy = self.verdict.remedy if self.verdict.action == "deny" else ""
            self._refuse(Verdict("deny", error.reason, self.verdict.rule, error.explanation, remedy))

    def _record(self, ended: str, code: int = 0) -> None:
        """Write the event, once. `ended` is what went wrong after an allowed beginning."""
        if self._over:
            return
        self._over = True
        self.server.open_forwards.discard(self)
        if self._flusher is not None:
            self._flusher.cancel()
        exchange, target = self.exchange, self.target
        if target is not None and self.verdict is MISDIRECTED:
            target = msgspec.structs.replace(target, path="")  # the placeholder may stand in it
        self.server.record(
            target,
            self.verdict,
            spelling=exchange.url.decode("latin-1"),
            ended=ended,
            line=self.line,
            begun=self._begun,
            duration_s=time.monotonic() - self._clock,
            status=code or exchange.status,
            up=exchange.bytes_up,
            down=exchange.bytes_down,
            credentials=self._used,
        )


class _Kept:
    """A connection to a server that the client's next request may use."""

    def __init__(self, upstream: HttpUpstream, place: tuple[str, int], line: Line) -> None:
        self.upstream, self.place, self.line = upstream, place, line

    def fits(self, target: Target) -> bool:
        return self.place == target.place and self.upstream.idle


def _close_kept(kept: object) -> None:
    """Close what is left when the client goes."""
    if isinstance(kept, _Kept):
        kept.upstream.close()
