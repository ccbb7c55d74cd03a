"""How much an agent may still use. Reserved before a call, settled after it; pure, and in one thread.

An `Account` belongs to an agent and is shared by all its runs of one broker. Each limit watches a span: the last
sixty seconds, a run, a day or a calendar month (UTC). `reserve` counts what a call may use at most as used, in every
span at once, or refuses; `settle` puts what it really used in its place. So parallel calls, retries and broken
streams cannot spend together what only one of them may: used and reserved never exceed the limit, and only a call
that turns out larger than its own reservation can pass it.

Clocks are arguments: `now` is wall time (seconds since the epoch, may step), `tick` monotonic. A call is settled in
the spans it was reserved in. Money is kept in whole billionths of a dollar, so that sums are exact.
"""

from __future__ import annotations

import math
import time
from calendar import timegm
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

from cloister.llm.errors import Refusal
from cloister.llm.ledger import Spent
from cloister.policy.model import Llm

SpanKind = Literal["minute", "run", "day", "month"]
Key = tuple[str, object]
Loader = Callable[[float, float, str], Spent]
"""`(since, until, run)`: what the books know of a span; `Books.spent` for one agent."""

DEFAULT_REQUESTS = 60
MINUTE_S = 60.0
_DAY_S = 86_400
_NANO = 1_000_000_000
_RUN_RETRY_S = 3600
_EXACT = 4096
_MERGED_S = 0.25
"""Beyond so many calls in the last minute, those that end within so many seconds are remembered, and forgotten, as
one: a thousand calls a second cost no more memory than ten."""
_SPANS: tuple[SpanKind, ...] = ("minute", "run", "day", "month")


class Limit(NamedTuple):
    """One limit of tokens or money."""

    reason: str
    """`tokens-per-day`, `cost-per-run` and so on: also the reason of a refusal."""
    span: SpanKind
    measure: int
    """0 for tokens, 1 for money."""
    amount: int
    """Tokens, or billionths of a dollar."""
    place: int
    """Of the span in `_SPANS`."""
    first_alert: float
    """The amount below which no alert can be due."""


class Limits(NamedTuple):
    """What an agent's policy allows."""

    requests: int = DEFAULT_REQUESTS
    concurrency: int | None = None
    limits: tuple[Limit, ...] = ()
    alerts: tuple[int, ...] = ()

    @property
    def priced(self) -> bool:
        """Whether money is limited, so that a model without a price cannot be used."""
        return any(limit.measure == 1 for limit in self.limits)


class Alert(NamedTuple):
    """A share of a budget that was passed."""

    reason: str
    percent: int
    used: float
    limit: float
    """Tokens or dollars."""


class Unknown(NamedTuple):
    """A span of which the books were not asked yet."""

    key: Key
    since: float
    until: float
    run: str
    before: tuple[int, int]
    """What was used and reserved in it when the question was made: the books have that too."""


class _Tally:
    """What was used and is reserved in one span."""

    __slots__ = ("alerted", "granted", "held", "loaded", "used")

    def __init__(self) -> None:
        self.used = [0, 0]
        self.held = [0, 0]
        self.granted = [0, 0]
        self.alerted = [0, 0]
        self.loaded = False


_Spans = tuple[tuple[Key, ...], list[_Tally]]


class Hold:
    """A reservation. It ends with `Account.settle` or `Account.release`, whichever comes first."""

    __slots__ = ("amount", "keys", "open", "tallies")

    def __init__(self, amount: tuple[int, int], keys: tuple[Key, ...], tallies: list[_Tally]) -> None:
        """Take what was reserved, and the spans it counts in."""
        self.amount, self.keys, self.tallies = amount, keys, tallies
        self.open = True


def compile_limits(llm: Llm) -> Limits:
    """Return the limits of an agent's table."""
    found = []
    first = min(llm.alerts, default=math.inf) / 100
    for place, span in enumerate(_SPANS):
        tokens = getattr(llm, f"tokens_per_{span}")
        if tokens is not None:
            found.append(Limit(f"tokens-per-{span}", span, 0, tokens, place, tokens * first))
        cost = getattr(llm, f"cost_per_{span}_usd")
        if cost is not None:
            amount = int(cost * _NANO)
            found.append(Limit(f"cost-per-{span}", span, 1, amount, place, amount * first))
    requests = DEFAULT_REQUESTS if llm.requests_per_minute is None else llm.requests_per_minute
    return Limits(requests, llm.concurrency, tuple(found), tuple(sorted(set(llm.alerts))))


class Account:
    """The budgets of one agent."""

    def __init__(self, limits: Limits, load: Loader) -> None:
        """Begin with what the books know."""
        self.limits = limits
        self.blocked = ""
        """Why the agent may not call at all; empty while it may (kill switch)."""
        self._load = load
        self._listeners: dict[str, Callable[[Alert], None]] = {}
        self._requests: deque[float] = deque()
        self._recent: deque[tuple[float, int, int]] = deque()
        self._merging_since = 0.0
        self._told: tuple[float, Limits | None, set[str]] = (-1.0, None, set())
        """Day, limits, and the runs for which nothing is unknown under them."""
        self._tallies: dict[Key, _Tally] = {("minute", 0): _Tally()}
        self._known: dict[str, _Spans] = {}
        self._holds: set[Hold] = set()
        self._calendar = (-1, (("day", -1), ("month", (0, 0))))

    @property
    def active(self) -> int:
        """How many calls are under way."""
        return len(self._holds)

    def unknown(self, run: str, now: float) -> list[Unknown]:
        """Return the spans that count for a call and of which the books were not asked yet.

        Whoever can wait asks first (`ask`, in any thread; then `learn`), so that `reserve` has nothing to ask.
        """
        day, limits, runs = self._told
        if self.blocked or (run in runs and limits is self.limits and day == now // _DAY_S):
            return []
        found = [] if self._tallies["minute", 0].loaded else [self._question(("minute", 0), now)]
        keys = self._keys(run, now)
        for limit in self.limits.limits:
            key = keys[limit.place]
            tally = self._tallies.get(key)
            if (tally is None or not tally.loaded) and all(one.key != key for one in found):
                found.append(self._question(key, now))
        if not found:
            same = limits is self.limits and day == now // _DAY_S
            self._told = (now // _DAY_S, self.limits, {*runs, run} if same else {run})
        return found

    def ask(self, one: Unknown) -> Spent:
        """Return what the books have of a span. May wait for a database; any thread may.

        Raises:
            CloisterError: they cannot be asked.
        """
        return self._load(one.since, one.until, one.run)

    def learn(self, one: Unknown, spent: Spent, tick: float) -> None:
        """Take what the books have of a span; a second time changes nothing.

        They count calls under way with their whole reservation, and what this process has used meanwhile; both are
        in the tally already. What settled between question and answer may be in either, so the larger sum counts.
        """
        tally = self._tallied(one.key)
        if tally.loaded:
            return
        tally.loaded = True
        amounts = (spent.tokens, math.ceil(spent.cost_usd * _NANO))
        if one.key[0] == "minute":
            self._requests.extend([tick] * min(spent.requests, self.limits.requests))
            if any(amounts):
                self._recent.append((tick, *amounts))
                tally.used = [used + amount for used, amount in zip(tally.used, amounts, strict=True)]
            return
        for measure, amount in enumerate(amounts):
            earlier = max(0, amount - one.before[measure])
            tally.used[measure] = max(tally.used[measure] + earlier, amount - tally.held[measure])
        self._mark(one.key, tally)

    def reserve(  # noqa: PLR0913 - a call in numbers
        self, run: str, tokens: int, cost_usd: float, now: float, tick: float, *, counted: bool = True
    ) -> Hold | Refusal:
        """Reserve for one call, or say which limit stands in its way.

        Args:
            run: who calls.
            tokens: the most that it may use.
            cost_usd: the most that it may cost.
            now: wall time at which the request was complete.
            tick: monotonic time.
            counted: whether it counts as a request; a further attempt of one call does not.
        """
        if self.blocked:
            return Refusal(403, "agent-blocked", f"this agent's model calls are blocked: {self.blocked}", again=False)
        limits = self.limits
        if limits.concurrency is not None and len(self._holds) >= limits.concurrency:
            words = f"{limits.concurrency} requests are under way already (concurrency)"
            return Refusal(429, "concurrency", words, 1)
        if not self._tallies["minute", 0].loaded:
            minute = self._question(("minute", 0), now)
            self.learn(minute, self.ask(minute), tick)
        self._forget(tick)
        if counted and len(self._requests) >= limits.requests:
            wait = math.ceil(self._requests[len(self._requests) - limits.requests] + MINUTE_S - tick)
            words = f"{limits.requests} requests per minute are used up (requests_per_minute)"
            return Refusal(429, "requests-per-minute", words, max(1, wait))
        nanos = math.ceil(cost_usd * _NANO)
        amount = (tokens, nanos)
        keys, tallies = self._spans(run, now)
        for limit in limits.limits:
            measure, tally = limit.measure, tallies[limit.place]
            if not tally.loaded:
                self._tally(keys[limit.place], now)
            most = limit.amount * (1 + tally.granted[measure])
            if tally.used[measure] + tally.held[measure] + amount[measure] > most:
                return self._exhausted(limit, tally, amount, most, now, tick)
        hold = Hold(amount, keys, tallies)
        for tally in tallies:
            held = tally.held
            held[0] += tokens
            held[1] += nanos
        if counted:
            self._requests.append(tick)
        self._holds.add(hold)
        return hold

    def settle(self, hold: Hold, tokens: int, cost_usd: float, tick: float) -> None:
        """Put what a call used in the place of its reservation. Once: a second time changes nothing."""
        if not hold.open:
            return
        used = (tokens, math.ceil(cost_usd * _NANO))
        self._free(hold)
        for tally in hold.tallies:
            spent = tally.used
            spent[0] += used[0]
            spent[1] += used[1]
        self._remember(tick, *used)
        self._warn(hold)

    def release(self, hold: Hold) -> None:
        """Take a reservation back: the call was not dispatched."""
        if hold.open:
            self._free(hold)

    def grant(self, run: str, reason: str, now: float) -> None:
        """Allow the amount of one limit once more, in the span that is under way."""
        for limit in self.limits.limits:
            if limit.reason == reason:
                self._tally(self._keys(run, now)[limit.place], now).granted[limit.measure] += 1

    def shares(self) -> dict[tuple[str, str], float]:
        """Return the used part of each day's and month's limit that was watched so far, by span and unit."""
        found: dict[tuple[str, str], float] = {}
        for key, tally in self._tallies.items():
            for limit in self.limits.limits:
                if limit.span == key[0] and key in self._calendar[1] and limit.amount:
                    unit = "usd" if limit.measure else "tokens"
                    found[limit.span, unit] = tally.used[limit.measure] / limit.amount
        return found

    def listen(self, run: str, tell: Callable[[Alert], None]) -> None:
        """Tell a run of shares that are passed: those of its own budget, and those of the agent's."""
        self._listeners[run] = tell

    def forget_run(self, run: str) -> None:
        """Drop what is known about a run that is over."""
        self._listeners.pop(run, None)
        self._told[2].discard(run)
        if not any(("run", run) in hold.keys for hold in self._holds):
            self._tallies.pop(("run", run), None)
            self._known.pop(run, None)

    # Inside.

    def _keys(self, run: str, now: float) -> tuple[Key, ...]:
        """Return the spans that a call belongs to, in the order of `_SPANS`."""
        day = int(now // _DAY_S)
        if self._calendar[0] != day:
            date = time.gmtime(now)
            self._calendar = (day, (("day", day), ("month", (date.tm_year, date.tm_mon))))
            self._prune()
        return (("minute", 0), ("run", run), *self._calendar[1])

    def _spans(self, run: str, now: float) -> _Spans:
        """Return the spans that a call belongs to, and their tallies; the same ones for all calls of a run and day."""
        kept = self._known.get(run)
        if kept is None or int(now // _DAY_S) != self._calendar[0]:
            keys = self._keys(run, now)
            if len(self._known) >= _EXACT:  # runs come and go
                self._known.clear()
            kept = self._known[run] = (keys, [self._tallied(key) for key in keys])
        return kept

    def _prune(self) -> None:
        """Drop days and months that are over; the books know them, should the clock step back."""
        self._known.clear()
        kept = {*self._calendar[1], *(key for hold in self._holds for key in hold.keys)}
        for key in [key for key in self._tallies if key[0] in {"day", "month"} and key not in kept]:
            del self._tallies[key]
        self._told = (-1.0, None, set())

    def _tallied(self, key: Key) -> _Tally:
        """Return a span's tally; one that no limit asks for need not know what was before."""
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = _Tally()
        return tally

    def _tally(self, key: Key, now: float) -> _Tally:
        """Return a span's tally with what the books know of it."""
        tally = self._tallied(key)
        if not tally.loaded:
            one = self._question(key, now)
            self.learn(one, self.ask(one), 0.0)
        return tally

    def _question(self, key: Key, now: float) -> Unknown:
        tally = self._tallied(key)
        return Unknown(key, *_bounds(key, now), (tally.used[0] + tally.held[0], tally.used[1] + tally.held[1]))

    def _forget(self, tick: float) -> None:
        """Let go of what is older than a minute."""
        since, requests = tick - MINUTE_S, self._requests
        while requests and requests[0] <= since:
            requests.popleft()
        recent, used = self._recent, self._tallies["minute", 0].used
        while recent and recent[0][0] <= since:
            _, tokens, cost = recent.popleft()
            used[0] -= tokens
            used[1] -= cost

    def _remember(self, tick: float, tokens: int, cost: int) -> None:
        """Note what the minute has to let go of later; never too early."""
        recent = self._recent
        if len(recent) < _EXACT or tick - self._merging_since >= _MERGED_S:
            self._merging_since = tick
            recent.append((tick, tokens, cost))
        else:
            _, before, paid = recent[-1]
            recent[-1] = (tick, before + tokens, paid + cost)

    def _free(self, hold: Hold) -> None:
        """End a reservation."""
        hold.open = False
        self._holds.discard(hold)
        amount = hold.amount
        for tally in hold.tallies:
            held = tally.held
            held[0] -= amount[0]
            held[1] -= amount[1]

    def _exhausted(  # noqa: PLR0913 - what the sentence is made of
        self, limit: Limit, tally: _Tally, amount: tuple[int, int], most: int, now: float, tick: float
    ) -> Refusal:
        """Say which limit stands in the way, how far it is used, and when it helps to ask again."""
        measure = limit.measure
        used, held = _shown(measure, tally.used[measure]), _shown(measure, tally.held[measure])
        again = limit.span == "minute" and amount[measure] <= most
        name = limit.reason.replace("-", "_")
        # "out of budget" is by what Pi 0.86.1 knows that asking again is of no use.
        begin = f"the budget {name}" if again else f"out of budget: {name}"
        words = (
            f"{begin} does not hold this request: {_shown(measure, most)} allowed, "
            f"{used} used, {held} reserved by requests under way, up to {_shown(measure, amount[measure])} asked for"
        )
        wait = self._wait(limit, amount[measure], most, now, tick)
        return Refusal(429, limit.reason, words, wait, again=again)

    def _wait(self, limit: Limit, amount: int, most: int, now: float, tick: float) -> int:
        """Return the seconds until the span has room, as far as it can be known."""
        if limit.span == "minute":
            tally = self._tallies["minute", 0]
            over = tally.used[limit.measure] + tally.held[limit.measure] + amount - most
            for at, *used in self._recent:
                over -= used[limit.measure]
                if over <= 0:
                    return max(1, math.ceil(at + MINUTE_S - tick))
            return int(MINUTE_S)
        if limit.span == "run":
            return _RUN_RETRY_S
        return max(1, math.ceil(_bounds(self._keys("", now)[limit.place], now)[1] - now))

    def _warn(self, hold: Hold) -> None:
        """Tell of the highest share that was passed since the last time."""
        for limit in self.limits.limits:
            tally = hold.tallies[limit.place]
            if limit.span == "minute" or tally.used[limit.measure] < limit.first_alert:
                continue
            percent = self._passed(limit, tally)
            if percent > tally.alerted[limit.measure]:
                tally.alerted[limit.measure] = percent
                unit = _NANO if limit.measure else 1
                alert = Alert(limit.reason, percent, tally.used[limit.measure] / unit, limit.amount / unit)
                own = str(hold.keys[1][1]) if limit.span == "run" else ""
                for run, tell in list(self._listeners.items()):
                    if own in {"", run}:
                        tell(alert)

    def _mark(self, key: Key, tally: _Tally) -> None:
        """What was passed before a restart was told before it."""
        for limit in self.limits.limits:
            if limit.span == key[0]:
                tally.alerted[limit.measure] = self._passed(limit, tally)

    def _passed(self, limit: Limit, tally: _Tally) -> int:
        """Return the highest alert that a tally has reached."""
        used, most = tally.used[limit.measure], limit.amount
        return max((percent for percent in self.limits.alerts if used * 100 >= most * percent and used), default=0)


def _bounds(key: Key, now: float) -> tuple[float, float, str]:
    """Return since, until and run of a span."""
    kind, which = key
    if kind == "minute":
        return now - MINUTE_S, now + 1, ""
    if kind == "day" and isinstance(which, int):
        return float(which * _DAY_S), float((which + 1) * _DAY_S), ""
    if kind == "month" and isinstance(which, tuple):
        year, month = which
        following = (year + month // 12, month % 12 + 1)
        return float(timegm((year, month, 1, 0, 0, 0))), float(timegm((*following, 1, 0, 0, 0))), ""
    return 0.0, now + _DAY_S, str(which)


def _shown(measure: int, amount: int) -> str:
    return f"{amount / _NANO:.4f} USD" if measure else f"{amount} tokens"
