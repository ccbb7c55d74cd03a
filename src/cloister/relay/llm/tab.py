"""What one call owes: its reservation, its row in the books, and the attempts that may have been billed before.

Opened before anything is sent, closed exactly once. It knows nothing of connections.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from cloister.errors import CloisterError
from cloister.llm.budgets import Hold
from cloister.llm.errors import Refusal
from cloister.llm.ledger import Row, Source
from cloister.llm.order import Order
from cloister.llm.routes import Route
from cloister.llm.tokens import Usage, add
from cloister.llm.upstreams import Upstream
from cloister.llm.usage import Metered

if TYPE_CHECKING:
    from cloister.relay.llm.service import Caller, Inference, Price

NOTHING = Usage()


class Tab:
    """The accounting of one call."""

    __slots__ = (
        "_caller", "_charged", "_hold", "_order", "_price", "_provider", "_reserved_usd", "_route", "_service",
        "attempts", "begun", "first_byte", "id", "opened", "request_id", "status", "time",
    )  # fmt: skip

    def __init__(self, service: Inference, caller: Caller, route: Route) -> None:
        """Begin now: the request is complete."""
        self._service, self._caller, self._route = service, caller, route
        self.time, self.begun = time.time(), time.monotonic()
        self.first_byte = 0.0
        """Monotonic time; 0 until there is one."""
        self.attempts = self.status = 0
        self.request_id = ""
        self.opened = False
        self.id = ""
        """Of the row; empty until there is one."""
        self._order: Order | None = None
        self._provider = ""
        self._price: Price | None = None
        self._hold: Hold | None = None
        self._reserved_usd = 0.0
        self._charged: list[tuple[Usage, float]] = []

    def open(self, order: Order, upstream: Upstream) -> Refusal | None:
        """Reserve for a call and note it; None when it may be sent.

        After this returned None, a crash does not lose the call: the next start counts its whole reservation.
        """
        self._order = order
        refusal = self._reserve(order, upstream, counted=True)
        if refusal is not None:
            return refusal
        self.id = self._service.new_id(self.time)
        try:
            self._service.books.opened(self._opening(order))
        except OSError as error:
            assert self._hold is not None  # noqa: S101 - reserved above
            self._caller.account.release(self._hold)
            words = f"calls cannot be written down, so none is made: {error.strerror or error}"
            return Refusal(503, "ledger-unavailable", words, 5)
        self.opened = True
        return None

    def begin_attempt(self) -> None:
        """Count a request that is sent upstream."""
        self.attempts, self.status = self.attempts + 1, 0

    def answered(self, status: int, fields: Mapping[bytes, bytes]) -> None:
        """Note what the head of the upstream's answer says."""
        self.status = status
        identity = fields.get(b"request-id") or fields.get(b"x-request-id") or b""
        self.request_id = identity[:200].decode("latin-1")

    def renew(self, upstream: Upstream, *, maybe_billed: bool) -> bool:
        """Reserve for another attempt; False when a budget has no room for it.

        An attempt that may have been billed counts with its whole reservation, here and in the row.
        """
        order, hold = self._order, self._hold
        assert order is not None and hold is not None  # noqa: S101, PT018 - a call under way
        if maybe_billed:
            self._charged.append((order.demand, self._reserved_usd))
            self._caller.account.settle(hold, order.demand.total, self._reserved_usd, time.monotonic())
        else:
            self._caller.account.release(hold)
        return self._reserve(order, upstream, counted=False) is None

    def close(self, outcome: str, metered: Metered | None = None, *, lost: bool = False, reason: str = "") -> None:
        """Put what was used in the place of the reservation, and write the row. Once.

        Args:
            outcome: as in the ledger.
            metered: what the answer told; None when there was none that costs.
            lost: nobody knows what the last attempt used, so it counts as a whole.
            reason: of a failure.
        """
        order, hold = self._order, self._hold
        if not self.opened or order is None or hold is None:
            return
        self.opened = False
        source: Source = "provider"
        usage, model = NOTHING, order.model
        if lost and hold.open:
            usage, source = order.demand, "estimated"
        elif metered is not None:
            usage, source = _completed(metered, order.demand), metered.source
            model = metered.model or model
        cost, label = self._priced(usage)
        self._caller.account.settle(hold, usage.total, cost, time.monotonic())
        for charged, dollars in self._charged:
            usage, cost, source = add(usage, charged), cost + dollars, "estimated"
        row = self._row(usage, cost, source, outcome, model, label, reason)
        self._service.books.closed(row)
        self._caller.called(row)

    def refuse(self, refusal: Refusal) -> None:
        """Write down that nothing was sent."""
        self.id = self._service.new_id(self.time)
        self.status = refusal.status
        refusals = self._caller.refusals
        refusals[refusal.reason] = refusals.get(refusal.reason, 0) + 1
        row = self._row(NOTHING, 0.0, "provider", "refused", reason=refusal.reason)
        if self._service.note_refusal(row):
            self._caller.called(row)

    def _reserve(self, order: Order, upstream: Upstream, *, counted: bool) -> Refusal | None:
        caller = self._caller
        price, cost = None, 0.0
        if self._route.metered:
            price = self._service.prices().find(upstream.protocol, order.model, upstream.name)
            if price is not None:
                cost = price.cost(order.demand)
            elif caller.account.limits.priced:
                return _no_price(order.model)
        try:
            hold = caller.account.reserve(
                caller.run, order.demand.total, cost, self.time, time.monotonic(), counted=counted
            )
        except CloisterError as error:  # a limit that came while the call was under way
            return Refusal(503, "ledger-unavailable", error.message, 5)
        if isinstance(hold, Refusal):
            return hold
        self._hold, self._reserved_usd = hold, cost
        self._provider, self._price = upstream.name, price
        return None

    def _priced(self, usage: Usage) -> tuple[float, str]:
        """Return dollars, and by which price."""
        if usage.cost_usd is not None:
            return usage.cost_usd, "upstream"
        if self._price is None:
            return 0.0, ""
        return self._price.cost(usage), self._price.label

    def _opening(self, order: Order) -> Row:
        """Return the row of a call that is about to be sent; what it does not say is not known yet."""
        caller, demand = self._caller, order.demand
        return Row(
            id=self.id, time=self.time, run=caller.run, agent=caller.agent, user=caller.user,
            provider=self._provider, route=self._route.name, model=order.model,
            input_tokens=demand.input_tokens, cache_write_5m_tokens=demand.cache_write_5m_tokens,
            cache_write_1h_tokens=demand.cache_write_1h_tokens, output_tokens=demand.output_tokens,
            cost_usd=self._reserved_usd, source="estimated", outcome="unknown", stream=order.stream, attempts=0,
        )  # fmt: skip

    def _row(  # noqa: PLR0913 - the parts of a row that change
        self, usage: Usage, cost: float, source: Source, outcome: str, model: str = "", price: str = "",
        reason: str = "",
    ) -> Row:  # fmt: skip
        caller, order = self._caller, self._order
        return Row(
            id=self.id, time=self.time, run=caller.run, agent=caller.agent, user=caller.user,
            provider=self._provider, route=self._route.name, model=model or (order.model if order else ""),
            input_tokens=usage.input_tokens, cache_read_tokens=usage.cache_read_tokens,
            cache_write_5m_tokens=usage.cache_write_5m_tokens, cache_write_1h_tokens=usage.cache_write_1h_tokens,
            output_tokens=usage.output_tokens, reasoning_tokens=usage.reasoning_tokens,
            cost_usd=cost, price=price, source=source, status=self.status, outcome=outcome, reason=reason,
            stream=order.stream if order else False, attempts=self.attempts,
            first_byte_s=self.first_byte - self.begun if self.first_byte else 0.0,
            duration_s=time.monotonic() - self.begun, request_id=self.request_id,
        )  # fmt: skip


def _completed(metered: Metered, demand: Usage) -> Usage:
    """Return the usage of an answer; where it told no input, that of the reservation, and no more output than asked."""
    usage = metered.usage
    if metered.source == "provider" or usage.total != usage.output_tokens:
        return usage
    return msgspec.structs.replace(demand, output_tokens=min(usage.output_tokens, demand.output_tokens))


def _no_price(model: str) -> Refusal:
    words = (
        f"the model {model[:100]!r} has no known price, so no budget in dollars can hold: "
        "write it into ~/.config/cloister/prices.toml"
    )
    return Refusal(403, "price-unknown", words, again=False)
