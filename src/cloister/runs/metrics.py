"""Counters of model calls since this process started, kept as plain numbers: the text is made when it is asked for.

A call costs about a microsecond here. Labels are bounded: names come from agents and upstreams, so when there are too
many combinations, further models are counted together as `other`. Turning this into the Prometheus text format is for
`runs/metrics_text.py`.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from cloister.llm.ledger import Row

MOST_SERIES = 1000
"""Combinations of agent, model, provider and status; beyond it the model is `other`."""
MOST_REASONS = 64
BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
KINDS = ("input", "cache_read", "cache_write_5m", "cache_write_1h", "output")


class Labels(NamedTuple):
    """What calls are told apart by."""

    agent: str
    model: str
    provider: str
    status: str


class Series(msgspec.Struct):
    """The numbers of one combination of labels."""

    requests: int = 0
    tokens: list[int] = msgspec.field(default_factory=lambda: [0] * len(KINDS))
    cost_usd: float = 0.0
    first_byte: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    first_byte_s: float = 0.0
    duration: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    duration_s: float = 0.0


class Books(msgspec.Struct, frozen=True):
    """How the books are."""

    waiting: int
    """Rows that are not in the ledger yet."""
    journal_bytes: int
    unwritten: int
    """Rows in memory only."""
    dropped: int
    """Refusals that were left out."""
    ledger_down: bool


class Told(msgspec.Struct, frozen=True):
    """The numbers of one moment, as they go from one process to another."""

    series: list[tuple[Labels, Series]]
    refusals: list[tuple[str, str, int]]
    in_flight: dict[str, int]
    books: Books
    budgets: list[tuple[str, str, str, float]]
    """Agent, span, unit, and the part that is used."""


class Metrics:
    """All counters. Not thread-safe by itself: the books hold their lock around it."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.series: dict[Labels, Series] = {}
        self.refusals: dict[tuple[str, str], int] = {}
        self.in_flight: dict[str, int] = {}

    def opened(self, row: Row) -> None:
        """Count a call that was dispatched."""
        self.in_flight[row.agent] = self.in_flight.get(row.agent, 0) + 1

    def left(self, row: Row) -> None:
        """Count a call that is not under way any more."""
        self.in_flight[row.agent] = max(0, self.in_flight.get(row.agent, 0) - 1)

    def closed(self, row: Row) -> None:
        """Count a call as it ended."""
        series = self._series(row)
        series.requests += 1
        counts = series.tokens
        counts[0] += row.input_tokens
        counts[1] += row.cache_read_tokens
        counts[2] += row.cache_write_5m_tokens
        counts[3] += row.cache_write_1h_tokens
        counts[4] += row.output_tokens
        series.cost_usd += row.cost_usd
        if row.first_byte_s > 0:  # no byte came: that is no time to a first byte
            series.first_byte[bisect_left(BUCKETS_S, row.first_byte_s)] += 1
            series.first_byte_s += row.first_byte_s
        series.duration[bisect_left(BUCKETS_S, row.duration_s)] += 1
        series.duration_s += row.duration_s

    def refused(self, row: Row) -> None:
        """Count a call that never left."""
        key = (row.agent, row.reason)
        if key not in self.refusals and len(self.refusals) >= MOST_REASONS:
            key = (row.agent if any(agent == row.agent for agent, _ in self.refusals) else "other", "other")
        self.refusals[key] = self.refusals.get(key, 0) + 1

    def tell(self, books: Books, budgets: Mapping[tuple[str, str, str], float]) -> Told:
        """Return the numbers of this moment, for another process."""
        return Told(
            [(labels, copy.deepcopy(one)) for labels, one in self.series.items()],
            [(agent, reason, count) for (agent, reason), count in self.refusals.items()],
            dict(self.in_flight),
            books,
            [(*key, share) for key, share in budgets.items()],
        )

    def hear(self, told: Told) -> Metrics:
        """Take the numbers of another process in place of one's own."""
        self.series = dict(told.series)
        self.refusals = {(agent, reason): count for agent, reason, count in told.refusals}
        self.in_flight = dict(told.in_flight)
        return self

    def copy(self) -> Metrics:
        """Return the numbers of this moment."""
        return copy.deepcopy(self)

    def _series(self, row: Row) -> Series:
        key = Labels(row.agent, row.model, row.provider, str(row.status))
        found = self.series.get(key)
        if found is None:
            if len(self.series) >= MOST_SERIES:
                key = Labels(row.agent, "other", "other", "other")
            found = self.series.setdefault(key, Series())
        return found
