"""One model call: decide, reserve, send, pass the answer on, settle. In this order, once each.

A `Call` gets a request that is whole (`intake`), and is the receiver of the upstream's answer. Before a byte of an
answer is passed on, another attempt may be made; afterwards never. Whatever happens in between, what was reserved is
settled and the row that was opened is closed, exactly once, in `_settle`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from cloister.egress.http1 import Body, Headers, HttpError
from cloister.llm import errors, upstreams
from cloister.llm.errors import Refusal
from cloister.llm.order import Order, explained, read_order
from cloister.llm.routes import Route
from cloister.llm.usage import Metered, read_answer
from cloister.relay.llm.answer import HEARTBEAT, Answer
from cloister.relay.llm.heads import Heads
from cloister.relay.llm.held import AGAIN, MAYBE_BILLED, NOT_PASSED, Held, delay, give_list, known_fields, passed_fields
from cloister.relay.llm.refusing import no_provider, refuse
from cloister.relay.llm.supply import Supply, SupplyError
from cloister.relay.llm.tab import NOTHING, Tab
from cloister.relay.whole_answer import WholeAnswer, written

if TYPE_CHECKING:
    from cloister.relay.exchange import Exchange
    from cloister.relay.llm.service import Caller, Inference
    from cloister.relay.upstream import HttpUpstream

_OK, _UNAUTHORIZED, _BAD_REQUEST = 200, 401, 400


class Call:
    """One request that may cost something."""

    def __init__(  # noqa: PLR0913 - what a call is made of
        self, service: Inference, caller: Caller, exchange: Exchange, route: Route, size: int, heads: Heads
    ) -> None:
        """Take a request that was read whole; `size` bytes of it are in memory until the call is over."""
        self.service, self.caller, self.exchange, self.route = service, caller, exchange, route
        self._size, self._heads = size, heads
        self._order: Order | None = None
        self._supplies: list[Supply] = []
        self._supply: Supply | None = None
        self._tab = Tab(service, caller, route)
        self._upstream: HttpUpstream | None = None
        self._answer: Answer | None = None
        self._task: asyncio.Task[None] | None = None
        self._held: Held | None = None
        self._head: tuple[int, bytes, Headers, Body] | None = None
        self._framing = ""
        self._moved = self._beat = self._drain_until = 0.0
        self._unsure = False
        """The last attempt may have been billed, and is not charged yet."""
        self._over = self._left = self._rekeyed = self._paused = False
        self._pause_s: float | None = None

    @property
    def shortest_s(self) -> float:
        """The shortest time limit that counts for this call."""
        if self._supply is None:
            return 4.0
        upstream = self._supply.upstream
        return min(upstream.first_byte_timeout_s, upstream.idle_timeout_s, self.service.bounds.heartbeat_s)

    def start(self, body: bytes) -> None:
        """Decide about a request that is complete, and send it."""
        self._supplies = self.caller.serving(self.route)
        if not self._supplies:
            self._refuse(no_provider(self.route))
            return
        self._supply = self._supplies.pop(0)
        if self.route.name == "models":
            self._order = Order("", stream=False, body=b"", hides_usage=False, demand=NOTHING)
        else:
            host = self._supply.upstream.host
            order = read_order(body, self.route, self.caller.access, self.caller.max_tokens, host)
            if isinstance(order, Refusal):
                self._refuse(explained(order, self.exchange.headers))
                return
            self._order = order
        self._reserve(self._order)

    def abandon(self) -> None:
        """The client is gone. What was sent is read on for a while, so that its usage is known."""
        if self._over:
            return
        self._left = True
        if self._upstream is not None and self._held is None:
            self._drain_until = time.monotonic() + self.service.bounds.drain_s
            self._press(paused=False)
            return
        self._stop("client-left")

    def shut(self) -> None:
        """The process ends: settle with what is known."""
        self._left = True
        self._stop("truncated" if self._tab.status else "unknown")

    def cut(self, refusal: Refusal) -> None:
        """End a call under way: its agent was blocked."""
        if self._left:
            self._stop("client-left")
        elif self._answer is not None:
            self._truncated(refusal.message)
        else:
            if self._task is not None:
                self._task.cancel()
            unanswered = self._upstream is not None
            self._drop_upstream()
            self._give_up(refusal, maybe_billed=unanswered)

    # Deciding.

    def _reserve(self, order: Order) -> None:
        """Reserve what the call may use, note it, and go on."""
        supply, account = self._supply, self.caller.account
        assert supply is not None  # noqa: S101 - chosen before
        if unknown := account.unknown(self.caller.run, self._tab.time):
            self._spawn(self._when(order, partial(self.service.learner.learn, account, unknown)))
            return
        refusal = self._tab.open(order, supply.upstream)
        if refusal is not None:
            self._exhausted(order, refusal)
            return
        self.service.begin(self)
        self._go()

    def _exhausted(self, order: Order, refusal: Refusal) -> None:
        """A budget stands in the way: ask the person where the policy says so, else refuse."""
        if self.caller.asks and refusal.reason.startswith(("tokens-", "cost-")):
            self._spawn(self._when(order, partial(self.caller.granted, refusal, self._tab.time)))
        else:
            self._refuse(refusal)

    async def _when(self, order: Order, answer: Callable[[], Awaitable[Refusal | None]]) -> None:
        """Reserve or refuse when an answer is there; the client may have left meanwhile."""
        refusal = await answer()
        if self._left or self._over:
            self._over = True
        elif refusal is not None:
            self._refuse(refusal)
        else:
            self._reserve(order)

    # Sending.

    def _go(self) -> None:
        """Send, at once where the key is known and a connection is open."""
        supply = self._supply
        assert supply is not None  # noqa: S101 - chosen before
        lines = supply.lines()
        connection = supply.take() if lines is not None and supply.signer is None else None
        if lines is None or connection is None:
            self._spawn(self._prepare(supply))
        else:
            self._transmit(connection, lines)

    async def _prepare(self, supply: Supply) -> None:
        """Get a key and a connection, then send."""
        lines = supply.lines()
        if lines is None:
            await supply.refresh()
            lines = supply.lines() or b""
        if supply.signer is not None:
            assert self._order is not None  # noqa: S101 - decided before
            exchange = self.exchange
            target = supply.upstream.target(self.route, exchange.url)
            lines += await supply.signature(exchange.method, target, exchange.headers, self._order.body)
        connection = supply.take() or await supply.dial()
        self.service.keep(supply)
        self._transmit(connection, lines)

    def _transmit(self, connection: HttpUpstream, lines: bytes) -> None:
        """Write the request."""
        order, supply, exchange = self._order, self._supply, self.exchange
        assert order is not None and supply is not None  # noqa: S101, PT018 - asked before
        body = order.body
        head = self._heads.known(supply, lines) or self._heads.make(
            supply, exchange.method, supply.upstream.target(self.route, exchange.url), exchange.headers, lines
        )
        head += upstreams.length_field(len(body) if exchange.method == "POST" else None)
        self._upstream, self._unsure = connection, False
        self._tab.begin_attempt()
        self._moved = time.monotonic()
        exchange.bytes_up += len(head) + len(body)
        whole = None if self.route.name == "models" else self._take_whole
        connection.ask(self, exchange.method, head, body, whole)
        if not self._left:
            exchange.connection.on_pressure(self._press)

    # The upstream's receiver.

    def _take_whole(self, answer: WholeAnswer) -> None:
        """Pass on an ordinary answer that came in one read, and settle: what `on_response` and its like do in steps."""
        exchange, supply, named = self.exchange, self._supply, answer.named
        kind = named.get(b"content-type", b"").lower()
        if self._left or not exchange.keep_alive or b"event-stream" in kind or b"content-encoding" in named:
            self.on_response(answer.status, answer.phrase, answer.headers, Body("length", len(answer.content)))
            self.on_response_body(answer.content)
            self.on_response_end([])
            return
        assert supply is not None and self._upstream is not None  # noqa: S101, PT018 - a call under way
        exchange.respond_all(answer.status, written(answer, NOT_PASSED))
        supply.judge(failed=False)
        supply.give(self._upstream)
        self._upstream = None
        self._tab.answered(answer.status, named)
        self._tab.first_byte = time.monotonic()
        self._settle("complete", metered=read_answer(answer.content, self.route.shape) if self.route.metered else None)
        exchange.respond_end([])

    def on_interim(self, status: int, phrase: bytes, headers: Headers) -> None:
        """Ignore it: the request is on its way as a whole."""

    def on_response(self, status: int, phrase: bytes, headers: Headers, body: Body) -> None:
        """Pass the head on, or hold the answer back where another attempt may follow."""
        order, supply = self._order, self._supply
        assert order is not None and supply is not None  # noqa: S101, PT018 - chosen before
        self._framing, self._moved = body.framing, time.monotonic()
        fields = known_fields(headers)
        self._tab.answered(status, fields)
        supply.judge(failed=status in AGAIN)
        if self.route.name == "models" or (not self._left and self._may_try_again(status, fields)):
            self._held = Held(status, phrase, headers, self.service.bounds.list_bytes)
            return
        stream = fields.get(b"content-type", b"").lstrip().lower().startswith(b"text/event-stream")
        hide = order.hides_usage and status == _OK
        coding = fields.get(b"content-encoding", b"")
        self._answer = Answer(self.route.shape, stream=stream, hide=hide, coding=coding)
        if not self._left:
            framing = Body("chunked") if (hide and stream) or body.framing == "close" else body
            self._head = (status, phrase, passed_fields(headers), framing)
            self.exchange.connection.loop.call_soon(self._flush)  # alone, unless more is at hand already

    def on_response_body(self, data: bytes) -> None:
        """Take what came in one read: it goes on in one write, with the head where that has not left yet."""
        if self._answer is not None:
            self._flush(data)
        elif self._held is not None and not self._held.take(data):
            self._drop_upstream()
            self._again()

    def on_response_end(self, trailers: Headers) -> None:
        """Settle and finish."""
        upstream, self._upstream = self._upstream, None
        if upstream is not None and self._supply is not None:
            self._supply.give(upstream)
        answer = self._answer
        self._flush()
        if answer is None:
            self._again()
        elif self._tab.status == _OK and answer.is_cut(self._framing):
            self._truncated("the upstream ended its answer before it was complete")
        elif self._left:
            self._settle("client-left")
        else:
            self._settle("complete")
            if rest := answer.rest():
                self.exchange.respond_body(rest)
            self.exchange.respond_end(trailers)

    def on_switch(self, phrase: bytes, headers: Headers, rest: bytes) -> None:
        """Cannot come: no other protocol was asked for."""

    def on_failure(self, error: HttpError) -> None:
        """Try again where nothing was answered, else say that it broke off."""
        upstream, self._upstream = self._upstream, None
        supply = self._supply
        assert supply is not None  # noqa: S101 - chosen before
        if self._answer is not None:
            supply.judge(failed=True)
            self._truncated(error.explanation)
        elif self._held is not None:
            self._again()
        elif upstream is not None and upstream.used and self._tab.attempts == 1 and not self._left:
            self._go()  # a kept connection that the server was just closing: nothing was read there
        else:
            supply.judge(failed=True)
            words = f"{supply.upstream.place}: {error.explanation}"
            self._failed(Refusal(502, "upstream-failed", words), maybe_billed=True)

    def on_pressure(self, *, paused: bool) -> None:
        """The upstream reads slowly; the body is in memory already."""

    def _flush(self, data: bytes = b"") -> None:
        """Count what came, and pass it on behind the head, where that has not left yet."""
        answer = self._answer
        if answer is None or self._over:
            return
        if data:
            self._moved = self._beat = time.monotonic()
            self._tab.first_byte = self._tab.first_byte or self._moved
            data = answer.take(data)
        head, self._head = self._head, None
        if self._left:
            if answer.bytes > self.service.bounds.drain_bytes and self._upstream is not None:
                self._stop("client-left")
        elif head is not None:
            self.exchange.respond(*head, data)
        elif data:
            self.exchange.respond_body(data)

    def _press(self, paused: bool) -> None:
        """The client reads slowly: so is the upstream read."""
        self._paused = paused
        self._moved = self._beat = time.monotonic()
        if self._upstream is not None:
            self._upstream.pause(paused)

    # Trying again.

    def _may_try_again(self, status: int, fields: dict[bytes, bytes]) -> bool:
        """Say whether an answer is held back: the key may have changed, or the policy allows another attempt."""
        supply = self._supply
        assert supply is not None  # noqa: S101 - chosen before
        if status == _UNAUTHORIZED and supply.upstream.auth != "none":
            return not self._rekeyed
        if status not in AGAIN:
            return False
        self._pause_s = delay(fields.get(b"retry-after"))
        patient = self._pause_s is None or self._pause_s <= self.service.bounds.patience_s
        return bool(self._supplies) or (self._tab.attempts <= supply.upstream.retries and patient)

    def _again(self) -> None:
        """An answer was held back and is over: decide what becomes of it."""
        held, supply = self._held, self._supply
        assert held is not None and supply is not None  # noqa: S101, PT018 - asked before
        if self._left:
            self._settle("client-left")
        elif self.route.name == "models":
            self._give_list(held)
        else:
            self._unsure = held.status in MAYBE_BILLED
            self._spawn(self._retry(supply, held))

    async def _retry(self, supply: Supply, held: Held) -> None:
        """Make another attempt, or give the client the answer that was held back."""
        if held.status == _UNAUTHORIZED:
            self._rekeyed = True
            if not await supply.refresh(rejected=True):
                self._give(held)
                return
        elif not await self._next(supply, maybe_billed=held.status in MAYBE_BILLED):
            self._give(held)
            return
        self._held = None
        self._go()

    async def _next(self, supply: Supply, *, maybe_billed: bool) -> bool:
        """Choose who is asked next, and reserve for it; False when a budget has no room for another attempt."""
        following = self._supplies.pop(0) if self._supplies else supply
        self._supply = following
        if following is supply:
            pause = 0.5 * 2 ** min(self._tab.attempts, 5) if self._pause_s is None else self._pause_s
            await asyncio.sleep(min(pause, self.service.bounds.patience_s))
        self._unsure = False
        if following is supply and not maybe_billed:
            return True
        return self._tab.renew(following.upstream, maybe_billed=maybe_billed)

    def _failed(self, refusal: Refusal, *, maybe_billed: bool) -> None:
        """No answer came: try again where the policy says so, else tell the client."""
        supply = self._supply
        assert supply is not None  # noqa: S101 - chosen before
        self._drop_upstream()
        more = bool(self._supplies) or (self._tab.attempts <= supply.upstream.retries and self._tab.attempts > 0)
        if self._left or not more:
            self._give_up(refusal, maybe_billed=maybe_billed)
            return

        self._unsure = maybe_billed

        async def again() -> None:
            if await self._next(supply, maybe_billed=maybe_billed):
                self._go()
            else:
                self._give_up(refusal, maybe_billed=False)

        self._spawn(again())

    def _give_up(self, refusal: Refusal, *, maybe_billed: bool) -> None:
        """Settle without an answer: what may have been billed counts as if it was."""
        self._tab.status = 0 if self._left else refusal.status
        self._settle("client-left" if self._left else "upstream-failed", lost=maybe_billed, reason=refusal.reason)
        refuse(self.exchange, self.route.shape, refusal)

    # Ending.

    def _settle(self, outcome: str, *, metered: Metered | None = None, lost: bool = False, reason: str = "") -> None:
        """Close the tab, once: with what the answer told, or with the whole reservation where nobody knows."""
        if self._over:
            return
        self._over = True
        self.service.buffered -= self._size
        self.service.end(self)
        if self._answer is not None and self._tab.status < _BAD_REQUEST and self.route.metered:
            metered = self._answer.finish()
        self._tab.close(outcome, metered, lost=lost and self.route.metered, reason=reason)

    def _give(self, held: Held) -> None:
        """Give the client an answer that was held back."""
        self._settle("complete", lost=held.status in MAYBE_BILLED)
        if not self._left:
            held.give(self.exchange)

    def _give_list(self, held: Held) -> None:
        """Give the client the models that are allowed, in its own protocol."""
        self._settle("complete")
        give_list(held, self.caller.access, self.route.shape, self.exchange)

    def _truncated(self, why: str) -> None:
        """Break the answer off so that the client knows: an error as the last event, and no clean end."""
        answer, exchange = self._answer, self.exchange
        assert answer is not None  # noqa: S101 - asked before
        self._drop_upstream()
        self._flush()
        self._settle("truncated")
        if self._left:
            return
        if answer.stream and not answer.coded:
            gap = b"" if answer.between_events else b"\n\n"
            end = errors.stream_end(self.route.shape, Refusal(502, "upstream-truncated", why))
            exchange.respond_body(answer.rest() + gap + end)
            exchange.break_off()
        else:
            exchange.fail()

    def sweep(self, now: float) -> None:
        """Enforce the time limits; there is none on the whole."""
        if self._upstream is None or self._supply is None:
            return
        upstream, answer = self._supply.upstream, self._answer
        if self._left and now > self._drain_until:
            self._stop("client-left")
        elif self._paused:
            return
        elif answer is None:
            if now - self._moved > upstream.first_byte_timeout_s:
                words = f"{upstream.place} did not answer in {upstream.first_byte_timeout_s:g} s"
                self._failed(Refusal(504, "first-byte-timeout", words), maybe_billed=True)
        elif now - self._moved > (upstream.idle_timeout_s if self._tab.first_byte else upstream.first_byte_timeout_s):
            self._truncated(f"{upstream.place} was silent for {now - self._moved:.0f} s")
        elif now - max(self._beat, self._moved) > self.service.bounds.heartbeat_s and answer.between_events:
            self._beat = now
            if not self._left:
                self.exchange.respond_body(HEARTBEAT)

    def _stop(self, outcome: str) -> None:
        """End at once: nobody waits for an answer any more."""
        if self._task is not None:
            self._task.cancel()
        unanswered = self._upstream is not None and self._answer is None and self._held is None
        self._drop_upstream()
        self._flush()
        self._settle(outcome, lost=unanswered or self._unsure)

    def _drop_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Go on in a task; what goes wrong there ends the call and is reported as the bug it is."""

        async def guarded() -> None:
            try:
                await work
            except SupplyError as error:
                self._failed(error.refusal, maybe_billed=False)
            except Exception:
                self._drop_upstream()
                self._settle("upstream-failed")
                self.exchange.fail()
                raise

        self._task = asyncio.get_running_loop().create_task(guarded())

    # Refusing.

    def _refuse(self, refusal: Refusal) -> None:
        """Answer a call that never left."""
        if self._over:
            return
        self._over = True
        self.service.buffered -= self._size
        self._tab.refuse(refusal)
        refuse(self.exchange, self.route.shape, refusal)
