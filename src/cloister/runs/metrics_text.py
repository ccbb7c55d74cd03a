"""The text of `/metrics`, by prometheus_client, in the Prometheus text format 0.0.4; imported when it is asked for.

Names, units and types follow https://prometheus.io/docs/practices/naming. Counters start at zero with the process; the
ledger is what stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from cloister.runs.metrics import BUCKETS_S, KINDS, Labels, Metrics, Series, Told

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABELS = ("agent", "model", "provider", "status")
_TIMED = ("agent", "model", "provider")


class Health(Protocol):
    """What is told of the books themselves."""

    @property
    def waiting(self) -> int:
        """Rows that are not in the ledger yet."""
        ...

    @property
    def journal_bytes(self) -> int:
        """Bytes of the journal."""
        ...

    @property
    def unwritten(self) -> int:
        """Rows in memory only."""
        ...

    @property
    def dropped(self) -> int:
        """Refusals that were left out."""
        ...

    @property
    def ledger_down(self) -> bool:
        """Whether the ledger cannot be written."""
        ...


def render(metrics: Metrics, health: Health, budgets: Mapping[tuple[str, str, str], float]) -> bytes:
    """Return the text.

    Args:
        metrics: the counters, a copy that nobody changes.
        health: how the books are.
        budgets: the part of each budget that is used or reserved, by agent, span (`minute`, `run`, `day`, `month`) and
            unit (`tokens`, `usd`, `requests`); 1 is all of it.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once([*_calls(metrics), *_books(health), _budgets(budgets)]))
    return generate_latest(registry)


def render_broker(runs: int | None, told: Told | None) -> bytes:
    """Return the text about a broker, which may not be there, and its model calls, if it had any.

    Args:
        runs: how many are alive; None where no broker is.
        told: the numbers of its model calls; None where nothing has called a model.
    """
    families: list[Metric] = [
        GaugeMetricFamily("cloister_broker_up", "1 when this user's broker runs.", value=int(runs is not None)),
        GaugeMetricFamily("cloister_runs_alive", "Runs that are alive.", value=runs or 0),
    ]
    if told is not None:
        budgets = {(agent, span, unit): share for agent, span, unit, share in told.budgets}
        families += [*_calls(Metrics().hear(told)), *_books(told.books), _budgets(budgets)]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(families))
    return generate_latest(registry)


class _Once:
    """A collector that gives what it was made with."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return the families."""
        return self._families


def _calls(metrics: Metrics) -> Iterator[Metric]:
    requests = CounterMetricFamily("cloister_llm_requests", "Model calls that were dispatched.", labels=_LABELS)
    tokens = CounterMetricFamily("cloister_llm_tokens", "Tokens, each in one kind.", labels=(*_LABELS, "kind"))
    cost = CounterMetricFamily("cloister_llm_cost_usd", "Dollars by the price list.", labels=_LABELS)
    for key, one in metrics.series.items():
        requests.add_metric(key, one.requests)
        cost.add_metric(key, one.cost_usd)
        for kind, count in zip(KINDS, one.tokens, strict=True):
            tokens.add_metric((*key, kind), count)
    first = HistogramMetricFamily(
        "cloister_llm_first_byte_seconds", "From the complete request to the answer's first byte.", labels=_TIMED
    )
    whole = HistogramMetricFamily(
        "cloister_llm_duration_seconds", "From the complete request to the end.", labels=_TIMED
    )
    for labels, all_first, first_s, all_whole, whole_s in _timed(metrics.series):
        first.add_metric(labels, _buckets(all_first), first_s)
        whole.add_metric(labels, _buckets(all_whole), whole_s)
    flight = GaugeMetricFamily("cloister_llm_in_flight", "Model calls under way.", labels=("agent",))
    for agent, count in metrics.in_flight.items():
        flight.add_metric((agent,), count)
    refused = CounterMetricFamily("cloister_llm_refused", "Model calls that were refused.", labels=("agent", "reason"))
    for key_, count in metrics.refusals.items():
        refused.add_metric(key_, count)
    yield from (requests, tokens, cost, first, whole, flight, refused)


def _books(health: Health) -> Iterator[Metric]:
    yield GaugeMetricFamily("cloister_ledger_waiting_rows", "Rows not in the ledger yet.", value=health.waiting)
    yield GaugeMetricFamily("cloister_ledger_unwritten_rows", "Rows in memory only.", value=health.unwritten)
    yield GaugeMetricFamily("cloister_ledger_journal_bytes", "Bytes of the journal.", value=health.journal_bytes)
    yield GaugeMetricFamily("cloister_ledger_up", "1 when the ledger takes rows.", value=int(not health.ledger_down))
    yield CounterMetricFamily("cloister_ledger_dropped_rows", "Refusals left out; never a call.", value=health.dropped)


def _budgets(budgets: Mapping[tuple[str, str, str], float]) -> Metric:
    used = GaugeMetricFamily(
        "cloister_llm_budget_used_ratio", "Part of a budget used or reserved.", labels=("agent", "span", "unit")
    )
    for key, ratio in budgets.items():
        used.add_metric(key, ratio)
    return used


def _timed(series: Mapping[Labels, Series]) -> list[tuple[tuple[str, str, str], list[int], float, list[int], float]]:
    """Return the histograms with the status left out: it would multiply their many lines."""
    found: dict[tuple[str, str, str], tuple[list[int], list[float], list[int]]] = {}
    for key, one in series.items():
        first, sums, whole = found.setdefault(key[:3], ([0] * len(one.first_byte), [0.0, 0.0], [0] * len(one.duration)))
        for place, count in enumerate(one.first_byte):
            first[place] += count
        for place, count in enumerate(one.duration):
            whole[place] += count
        sums[0] += one.first_byte_s
        sums[1] += one.duration_s
    return [(key, first, sums[0], whole, sums[1]) for key, (first, sums, whole) in found.items()]


def _buckets(counts: list[int]) -> list[tuple[str, float]]:
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets
