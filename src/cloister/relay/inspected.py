"""One request inside TLS that ends here: decided with method and path, secrets put in, sent on.

The order is the point. The host must be the one the connection is for; the rules are asked; only
then does the broker put secrets in, what would leave is searched for placeholders that belong
elsewhere, and the server's certificate is verified before the first byte is written. Where an
answer's echoes are to be masked, it is asked for in plain coding.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cloister.credentials.mask import Masker
from cloister.egress import http1
from cloister.egress.decision import Target, Verdict
from cloister.egress.http1 import Body, Headers, HttpError
from cloister.relay.exchange import Exchange
from cloister.relay.forward import Forward
from cloister.relay.lanes import Outgoing
from cloister.relay.leaks import MISDIRECTED, Watch
from cloister.relay.override import override
from cloister.relay.session import Broker, RefusedError, Swap, failed
from cloister.relay.upstream import HttpUpstream

if TYPE_CHECKING:
    from cloister.relay.h2_client import H2Lane
    from cloister.relay.server import EgressServer
    from cloister.relay.terminate import Termination

_IDENTITY = (b"accept-encoding", b"identity")


class Inspected(Forward):
    """Such a request on its way."""

    def __init__(self, server: EgressServer, exchange: Exchange, client: Termination, broker: Broker) -> None:
        """Belong to a connection whose TLS ends here."""
        super().__init__(server, exchange)
        self._client, self._broker = client, broker
        self.target = Target("https", client.target.host, client.target.port, exchange.method)
        self._masker: Masker | None = None
        self._whole: bytes | None = None
        """The body, where the broker had to see it first."""

    @override
    def start(self) -> None:
        """Decide; the rest waits for the broker, at least."""
        verdict = self._judge()
        if verdict.action == "deny":
            self._refuse(verdict)
            return
        self._spawn()

    # The exchange's sink, with the body already sent where it was collected.

    @override
    def write_body(self, data: bytes) -> None:
        """Pass a piece of the request body on."""
        if self._whole is None:
            super().write_body(data)

    @override
    def end_body(self, trailers: Headers) -> None:
        """Pass the end of the request body on."""
        if self._whole is None:
            super().end_body(trailers)

    # The upstream's receiver, with echoes masked.

    @override
    def on_interim(self, code: int, phrase: bytes, headers: Headers) -> None:
        """Pass a 1xx response on."""
        super().on_interim(code, self._masked(phrase), self._masked_fields(headers))

    @override
    def on_response(self, code: int, phrase: bytes, headers: Headers, body: Body) -> None:
        """Pass the head on, unless its body could not be masked."""
        if self._masker is not None and body.framing != "none" and _is_coded(headers):
            upstream, self._upstream = self._upstream, None
            if upstream is not None:
                upstream.close()
            why = "the server's answer is compressed although it was asked not to be, so it cannot be masked"
            self._broken_off(HttpError("answer-coded", why))
            return
        super().on_response(code, self._masked(phrase), self._masked_fields(headers), body)

    @override
    def on_response_body(self, data: bytes) -> None:
        """Pass a piece of the response body on."""
        safe = data if self._masker is None else self._masker.feed(data)
        if safe:
            super().on_response_body(safe)

    @override
    def on_response_end(self, trailers: Headers) -> None:
        """Finish."""
        rest = b"" if self._masker is None else self._masker.flush()
        if rest:
            super().on_response_body(rest)
        super().on_response_end(self._masked_fields(trailers))

    # Inside.

    @override
    def _read_target(self) -> Target:
        """Return what is asked of the host this connection is for."""
        exchange, place = self.exchange, self._client.target
        if exchange.method == "CONNECT":
            raise HttpError("bad-request", "there is no proxy inside this connection")
        hosts = [value for name, value in exchange.headers if name.lower() == b"host"]
        if len(hosts) > 1:
            raise HttpError("bad-request", "the request has more than one Host field")
        self._request = http1.parse_origin(exchange.method, exchange.url, hosts, place.host, place.port)
        return Target("https", place.host, place.port, exchange.method, self._request.target)

    @override
    def _judge(self) -> Verdict:
        """Decide without asking: whoever allowed the connection allowed what no rule speaks of."""
        try:
            self.target = self._read_target()
        except HttpError as error:
            self.exchange.keep_alive = False
            return Verdict("deny", error.reason, explanation=error.explanation)
        verdict = self.server.gate.decide(self.target)
        return self._client.verdict if verdict.action == "ask" else verdict

    @override
    async def _go(self) -> None:
        """Put secrets in, connect, and go on."""
        target, exchange = self.target, self.exchange
        if target is None:
            return
        try:
            self.verdict = self._judge()
            lanes = self._client.lanes
            if not self.verdict.allowed or lanes is None:
                self._refuse(self.verdict)
                return
            outgoing = await self._prepared(target)
            lane, self.line = await lanes.find(target)
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
            lane.close()
            self._refuse(late or self.verdict)
            return
        self._send_on(lane, outgoing)

    async def _prepared(self, target: Target) -> Outgoing:
        """Return the request as it leaves.

        Raises:
            RefusedError: when the broker refuses, or a placeholder would leave.
        """
        exchange = self.exchange
        headers = [(b"host", self._request.authority.encode())]
        drop = http1.HOP_BY_HOP | {b"host"} | http1.connection_tokens(exchange.headers)
        headers += [field for field in exchange.headers if field[0].lower() not in drop]
        bound = self._broker.body_needed(target, headers)
        if bound:
            headers = [field for field in headers if field[0].lower() != b"expect"]
            self._whole = await Collector(exchange, self._task).collect(bound)
        swap = await self._swapped(target, headers)
        self._used = swap.used
        if swap.masks:
            self._masker = Masker(swap.masks)
            swap = swap._replace(headers=[*(f for f in swap.headers if f[0].lower() != _IDENTITY[0]), _IDENTITY])
            if exchange.websocket:
                raise failed("answer-coded", "a WebSocket cannot be masked, and the policy wants that for this host")
        body = exchange.body if self._whole is None else Body("length", len(self._whole))
        trailers = any(f[0].lower() == b"te" and b"trailers" in f[1].lower() for f in exchange.headers)
        line = self._request._replace(target=swap.path)
        outgoing = Outgoing(exchange.method, line, swap.headers, body, exchange.websocket, trailers)
        if self._broker.leaks(outgoing.encode()) or (self._whole and self._broker.leaks(self._whole, target.place)):
            raise RefusedError(MISDIRECTED)
        return outgoing

    async def _swapped(self, target: Target, headers: Headers) -> Swap:
        """Let the broker put secrets in. What goes wrong there never shows more than its kind.

        Raises:
            RefusedError: as the broker does, and for everything else that happens in it.
        """
        try:
            swap = await self._broker.swap(target, headers, self._whole or b"")
            http1.check_headers(swap.headers)
            http1.check_target(swap.path)
        except (RefusedError, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001 - its text may hold a secret
            why = f"the credential for {target.authority} could not be put in ({type(error).__name__})"
            raise failed("secret-unavailable", why) from None
        return swap

    def _send_on(self, lane: HttpUpstream | H2Lane, outgoing: Outgoing) -> None:
        """Send the request to its server."""
        exchange, self._upstream = self.exchange, lane
        if isinstance(lane, HttpUpstream):
            head = outgoing.encode()
            exchange.bytes_up += len(head)
            lane.begin(self, outgoing.method, head, outgoing.body, websocket=outgoing.websocket)
        else:
            exchange.bytes_up += lane.begin(self, outgoing)
        if self._upstream is not lane:
            return  # it failed at once
        self.server.open_forwards.add(self)
        exchange.connection.on_pressure(lane.pause)
        if self._whole is None:
            self._watch = Watch(self._broker, self._client.target.place)
        else:
            exchange.bytes_up += len(self._whole)
            lane.write_body(self._whole)
            lane.end_body([])
        exchange.attach(self)

    @override
    def _leave(self) -> None:
        """The client's connection becomes a tunnel."""
        self._client.forget()

    def _masked(self, data: bytes) -> bytes:
        """Mask what stands for itself."""
        return data if self._masker is None else self._masker.mask(data)

    def _masked_fields(self, headers: Headers) -> Headers:
        """Mask names and values: a server could echo into either."""
        if self._masker is None:
            return headers
        return [(self._masked(name), self._masked(value)) for name, value in headers]


class Collector:
    """Takes a whole body, up to a bound."""

    def __init__(self, exchange: Exchange, task: asyncio.Task[None] | None) -> None:
        """Collect for a task, which ends with the client."""
        self._exchange, self._task = exchange, task
        self._pieces: list[bytes] = []
        self._bound = self._room = 0
        self._done: asyncio.Future[bytes] = exchange.connection.loop.create_future()

    async def collect(self, bound: int) -> bytes:
        """Return the body.

        Raises:
            RefusedError: `body-too-large` when it is longer than `bound` bytes.
        """
        exchange = self._exchange
        self._bound = self._room = bound
        if exchange.body.framing == "length" and exchange.body.length > bound:
            raise _too_large(bound)
        if any(name.lower() == b"expect" for name, _ in exchange.headers):
            exchange.interim(100, b"Continue", [])
        exchange.attach(self)
        try:
            return await self._done
        finally:
            exchange.detach()

    def write_body(self, data: bytes) -> None:
        """Keep a piece."""
        self._room -= len(data)
        if self._room >= 0:
            self._pieces.append(data)
        elif not self._done.done():
            self._pieces.clear()
            self._done.set_exception(_too_large(self._bound))

    def end_body(self, _trailers: Headers) -> None:
        """Hand it over; trailers of a body that is signed as a whole have no place."""
        if not self._done.done():
            self._done.set_result(b"".join(self._pieces))

    def abandon(self) -> None:
        """The client is gone."""
        if self._task is not None:
            self._task.cancel()


def _too_large(bound: int) -> RefusedError:
    """Return the refusal of a body that cannot be collected."""
    return failed("body-too-large", f"a body that has to be signed may hold at most {bound} bytes")


def _is_coded(headers: Headers) -> bool:
    """Say whether a body is compressed."""
    codings = [value.strip().lower() for name, value in headers if name.lower() == b"content-encoding"]
    return any(coding not in {b"", b"identity"} for coding in codings)
