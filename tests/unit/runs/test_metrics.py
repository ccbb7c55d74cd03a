"""Metrics: names, units and numbers that Prometheus understands, bounded whatever agents ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloister.runs import metrics
from cloister.runs.books import BookKeeper
from support.books import ended, noted, open_books, refusal

BASE = {"agent": "claude", "model": "claude-opus-5", "provider": "anthropic"}


def _samples(books: BookKeeper, **settings: object) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return every sample as an independent parser reads the text."""
    text = books.metrics_text(**settings).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


@pytest.fixture
def books(tmp_path: Path) -> BookKeeper:
    """Books whose writer is stopped: rows stay in memory."""
    keeper = open_books(tmp_path)
    keeper._writer.stop(5)
    return keeper


def test_a_call_is_counted_in_every_metric(books: BookKeeper) -> None:
    """Requests, tokens by kind, dollars, latencies, calls under way and refusals are what the rows say."""
    row = noted(1, cache_read_tokens=3, cache_write_5m_tokens=5, cache_write_1h_tokens=7)
    books.opened(row)
    books.opened(noted(2))
    assert _samples(books)[_key("cloister_llm_in_flight", agent="claude")] == 2
    books.closed(ended(row))
    books.closed(ended(noted(2), first_byte_s=0.0, duration_s=700.0))
    books.refused(refusal(3))
    books.opened(noted(4))
    samples = _samples(books, budgets={("claude", "day", "usd"): 0.25})

    labels = {**BASE, "status": "200"}
    assert samples[_key("cloister_llm_requests_total", **labels)] == 2
    kinds = {"input": 200, "cache_read": 3, "cache_write_5m": 5, "cache_write_1h": 7, "output": 40}
    for kind, count in kinds.items():
        assert samples[_key("cloister_llm_tokens_total", **labels, kind=kind)] == count
    assert samples[_key("cloister_llm_cost_usd_total", **labels)] == pytest.approx(0.002)
    assert samples[_key("cloister_llm_first_byte_seconds_count", **BASE)] == 1
    assert samples[_key("cloister_llm_first_byte_seconds_bucket", **BASE, le="0.25")] == 0
    assert samples[_key("cloister_llm_first_byte_seconds_bucket", **BASE, le="0.5")] == 1
    assert samples[_key("cloister_llm_duration_seconds_bucket", **BASE, le="600.0")] == 1
    assert samples[_key("cloister_llm_duration_seconds_bucket", **BASE, le="+Inf")] == 2
    assert samples[_key("cloister_llm_duration_seconds_sum", **BASE)] == pytest.approx(702)
    assert samples[_key("cloister_llm_in_flight", agent="claude")] == 1
    assert samples[_key("cloister_llm_refused_total", agent="claude", reason="budget-exhausted")] == 1
    assert samples[_key("cloister_llm_budget_used_ratio", agent="claude", span="day", unit="usd")] == 0.25
    assert samples[_key("cloister_ledger_waiting_rows")] == 3
    assert samples[_key("cloister_ledger_unwritten_rows")] == 0
    assert samples[_key("cloister_ledger_dropped_rows_total")] == 0
    assert samples[_key("cloister_ledger_up")] == 1
    assert samples[_key("cloister_ledger_journal_bytes")] > 100


def test_names_that_agents_invent_do_not_make_series_without_end(
    books: BookKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound further models are one series, and no call is left out of the sum."""
    monkeypatch.setattr(metrics, "MOST_SERIES", 10)
    for number in range(100):
        books.opened(noted(number, model=f"invented-{number}"))
        books.closed(ended(noted(number), model=f"invented-{number}"))
        books.refused(refusal(1000 + number, agent=f"agent-{number}"))
    samples = _samples(books)
    requests = {key: value for key, value in samples.items() if key[0] == "cloister_llm_requests_total"}
    assert sum(requests.values()) == 100
    assert len(requests) == 11
    refused = {key: value for key, value in samples.items() if key[0] == "cloister_llm_refused_total"}
    assert sum(refused.values()) == 100
    assert len(refused) <= metrics.MOST_REASONS + 1


def test_labels_are_escaped(books: BookKeeper) -> None:
    """A quote, a backslash and a line feed in a model's name end no line of the text."""
    row = noted(1, model='a"b\\c\nd')
    books.opened(row)
    books.closed(ended(row, model=row.model))
    names = {dict(labels).get("model") for _, labels in _samples(books)}
    assert 'a"b\\c\ufffdd' in names


def test_rows_of_an_earlier_process_are_not_counted_again(tmp_path: Path) -> None:
    """Counters begin at zero with the process: replayed rows are in the ledger, not in the metrics."""
    books = open_books(tmp_path)
    books.opened(noted(1))
    books.close()
    again = open_books(tmp_path)
    assert again.drained(5)
    assert not [key for key in _samples(again) if key[0] == "cloister_llm_requests_total"]
    again.close()
