"""Counters of model calls since this process started, kept as plain numbers: the text is made when it is asked for.

A call costs about a microsecond here. Labels are bounded: names come from agents and upstreams, so when there are too
many combinations, further models are counted together as `other`. Turning this into the Prometheus text format is for
`runs/metrics_text.py`.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from typing import NamedTuple

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


class Series:
    """The numbers of one combination of labels."""

    __slots__ = ("cost_usd", "duration", "duration_s", "first_byte", "first_byte_s", "requests", "tokens")

    def __init__(self) -> None:
        """Start at zero."""
        self.requests = 0
        self.tokens = [0] * len(KINDS)
        self.cost_usd = 0.0
        self.first_byte = [0] * (len(BUCKETS_S) + 1)
        self.first_byte_s = 0.0
        self.duration = [0] * (len(BUCKETS_S) + 1)
        self.duration_s = 0.0


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
