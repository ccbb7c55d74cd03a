"""What all model calls of one process share, and who calls. Values and bookkeeping; `call` does the work."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cloister.llm.access import Access
from cloister.llm.budgets import Account
from cloister.llm.errors import Refusal
from cloister.llm.ledger import Books, Row
from cloister.llm.routes import Route
from cloister.llm.tokens import Usage
from cloister.relay.llm.learning import Learner
from cloister.relay.llm.supply import Supply

if TYPE_CHECKING:
    from cloister.relay.llm.call import Call
    from cloister.relay.llm.recorded import Recorder

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [one + two for one in _ALPHABET for two in _ALPHABET]


class Price(Protocol):
    """What one model costs (`llm/prices.py`)."""

    @property
    def label(self) -> str:
        """Date and entry."""
        ...

    def cost(self, usage: Usage) -> float:
        """Return dollars."""
        ...


class Prices(Protocol):
    """The list of prices (`llm/prices.py`)."""

    def find(self, protocol: str, model: str, provider: str = "") -> Price | None:
        """Return the price of a model, or None."""
        ...


class Redacts(Protocol):
    """Takes out of bodies what an agent's table names (`runs/redaction.py`)."""

    def at_once(self, body: bytes) -> tuple[bytes, int] | None:
        """Return a body without what is taken out, and how many matches; None where that may take its time."""
        ...

    async def aside(self, body: bytes) -> tuple[bytes, int] | Refusal:
        """Return the same, worked out elsewhere, or why it was not."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one process takes on. Times in seconds."""

    body_bytes: int = 64 * 1024 * 1024
    """Of one request: prompts with pictures have tens of megabytes."""
    all_bodies_bytes: int = 512 * 1024 * 1024
    """Of all requests that are being read or waiting for an answer."""
    list_bytes: int = 4 * 1024 * 1024
    drain_s: float = 60.0
    """How long an answer is read on after its client has left, so that its usage is known."""
    drain_bytes: int = 32 * 1024 * 1024
    heartbeat_s: float = 15.0
    """Silence in a stream after which a comment is sent, so that nothing between here and the client gives up."""
    books_s: float = 10.0
    """The longest wait for what the books know of the time before."""
    patience_s: float = 20.0
    """The longest wait before a retry; what asks for more is passed on."""


async def _nobody(_refusal: Refusal) -> bool:
    """Grant nothing."""
    return False


def _no_event(_kind: str, _fields: dict[str, object]) -> None:
    """Record nothing."""


def _no_row(_row: Row) -> None:
    """Tell nobody."""


@dataclass(slots=True)
class Caller:
    """Who calls: one run of an agent, and what it may use. A reload replaces fields; calls under way keep theirs."""

    run: str
    agent: str
    user: str
    access: Access
    supplies: tuple[Supply, ...]
    account: Account
    token: str = field(default="", repr=False)
    """The placeholder that the run's programs present; empty where the caller is known otherwise."""
    former: tuple[str, ...] = field(default=(), repr=False)
    """What they present where they go on from the memory of other runs."""
    max_tokens: int | None = None
    fallback: bool = False
    redactor: Redacts | None = None
    recorder: Recorder | None = None
    """Writes down what calls say, where the policy asks for it."""
    asks: bool = False
    """Whether somebody may be asked when a budget is used up."""
    ask: Callable[[Refusal], Awaitable[bool]] = _nobody
    """Asks the person at the terminal whether a budget that is used up is granted once more."""
    record: Callable[[str, dict[str, object]], None] = _no_event
    called: Callable[[Row], None] = _no_row
    """Told of each call that ended or was refused, beside the books."""
    refusals: dict[str, int] = field(default_factory=dict)
    """How many calls were refused, by reason: for the receipt of a run."""
    _routes: dict[Route, tuple[tuple[Supply, ...], list[Supply]]] = field(default_factory=dict, repr=False)

    _questions: dict[str, asyncio.Task[bool]] = field(default_factory=dict, repr=False)

    async def granted(self, refusal: Refusal, now: float) -> Refusal | None:
        """Ask whether a budget is granted once more; None when it is. Requests for the same one share the question."""
        question = self._questions.get(refusal.reason)
        if question is None:
            question = asyncio.get_running_loop().create_task(self._ask_once(refusal, now))
            self._questions[refusal.reason] = question
            question.add_done_callback(lambda _: self._questions.pop(refusal.reason, None))
        return None if await asyncio.shield(question) else refusal

    async def _ask_once(self, refusal: Refusal, now: float) -> bool:
        if not await self.ask(refusal):
            return False
        self.account.grant(self.run, refusal.reason, now)
        self.record("budget-granted", {"reason": refusal.reason})
        return True

    def serving(self, route: Route) -> list[Supply]:
        """Return the upstreams that may serve a route, the first to be asked first; one, unless there is fallback."""
        kept = self._routes.get(route)
        if kept is None or kept[0] is not self.supplies:
            found = [supply for supply in self.supplies if supply.upstream.protocol in route.protocols]
            kept = self._routes[route] = (self.supplies, found)
        return sorted(kept[1], key=lambda supply: supply.resting) if self.fallback else kept[1][:1]


class Inference:
    """The shared part: books, prices, clocks, and the calls under way."""

    def __init__(self, books: Books, prices: Callable[[], Prices], bounds: Bounds | None = None) -> None:
        """Begin without calls."""
        self.books, self.prices = books, prices
        self.bounds = bounds or Bounds()
        self.calls: set[Call] = set()
        self.learner = Learner(self.bounds.books_s)
        self.buffered = 0
        """Bytes of request bodies in memory."""
        self._supplies: set[Supply] = set()
        self._noted: dict[tuple[str, str], float] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._count = itertools.count(int.from_bytes(os.urandom(6), "big"))
        self._process = int.from_bytes(os.urandom(4), "big")
        self._millisecond = self._thousand = -1
        self._time = self._middle = ""

    def new_id(self, now: float) -> str:
        """Return an id for a call: 26 characters that sort by time (as ULID: 48 bits of time, 80 of other)."""
        milliseconds, count = int(now * 1000), next(self._count) & 0xFFFF_FFFF_FFFF
        if milliseconds != self._millisecond:
            self._millisecond, self._time = milliseconds, _spelled(milliseconds, 5)
        if count >> 10 != self._thousand:
            self._thousand, self._middle = count >> 10, _spelled((self._process << 48 | count) >> 10, 7)
        return self._time + self._middle + _PAIRS[count & 1023]

    def begin(self, call: Call) -> None:
        """Watch a call's time limits."""
        self.calls.add(call)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(self._pause(), self._sweep)

    def end(self, call: Call) -> None:
        """Stop watching."""
        self.calls.discard(call)

    def note_refusal(self, row: Row) -> bool:
        """Write down a refusal: one a second of a kind and run, since an agent may ask as fast as it likes.

        Returns whether it was this one.
        """
        key, now = (row.run, row.reason), time.monotonic()
        if now - self._noted.get(key, -1.0) < 1.0:
            return False
        if len(self._noted) > 1024:  # noqa: PLR2004 - runs come and go
            self._noted.clear()
        self._noted[key] = now
        self.books.refused(row)
        return True

    def keep(self, supply: Supply) -> None:
        """Know of an upstream, so that its idle connections are closed in time."""
        self._supplies.add(supply)

    async def close(self) -> None:
        """End what is under way; each call that was dispatched gets its row."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for call in list(self.calls):
            call.shut()
        for supply in self._supplies:
            supply.close()
        await asyncio.sleep(0)

    def _pause(self) -> float:
        """Return how long to wait until the next look: fine enough for the shortest limit under way."""
        shortest = min((call.shortest_s for call in self.calls), default=4.0)
        return min(max(shortest / 4, 0.02), 1.0)

    def _sweep(self) -> None:
        now = time.monotonic()
        for call in list(self.calls):
            call.sweep(now)
        for supply in self._supplies:
            supply.expire(now)
        self._sweeper = None
        if self.calls or any(supply.busy for supply in self._supplies):
            self._sweeper = asyncio.get_running_loop().call_later(self._pause(), self._sweep)


def _spelled(number: int, pairs: int) -> str:
    """Return the last so many pairs of digits of a number to the base of 32."""
    return "".join([_PAIRS[number >> shift & 1023] for shift in range(10 * (pairs - 1), -1, -10)])
