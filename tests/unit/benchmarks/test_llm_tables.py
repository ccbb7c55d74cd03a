"""The pure parts of the benchmark of the inference proxy: what samples say, and of which target."""

from __future__ import annotations

import json
from typing import Any

import pytest
from benchmarks.llm import asking, tables
from benchmarks.llm.cells import Cell, Sample, counting
from benchmarks.llm.usage import Clocks
from benchmarks.report import Target

JSON_1, JSON_32, PACED = Cell("json", 1, 1.0), Cell("json", 32, 1.0), Cell("paced", 128, 1.0)


def load(**values: Any) -> asking.Load:
    """Return what the generator says of a load that went well."""
    nothing = dict.fromkeys(asking.Load._fields, 0)
    return asking.Load(**{**nothing, "all": 10, "finished": 10, "good": 10, **values})


def sample(name: str, cell: Cell, *, foreign: float = 0.0, cpu_us: float = 20.0, **values: Any) -> Sample:
    """Return one sample."""
    return Sample(name, cell, load(**values), cpu_us, 30.0, foreign)


def test_noisy_samples_do_not_count_where_there_are_quiet_ones() -> None:
    """Others on the machine only ever slow a proxy down; without any quiet sample the noisy ones must do."""
    quiet, noisy = sample("nginx", JSON_1), sample("nginx", JSON_1, foreign=0.5)
    assert counting([noisy, quiet]) == [quiet]
    assert counting([noisy]) == [noisy]


def test_ratios_are_taken_within_one_load() -> None:
    """Each row is compared with nginx and LiteLLM at the same number of connections, and with no proxy at all."""
    samples = [
        sample("direct", JSON_32, per_second=100.0, p50=10), sample("nginx", JSON_32, per_second=50.0, p50=20),
        sample("LiteLLM", JSON_32, per_second=0.1, p50=9000), sample("aiohttp", JSON_32, per_second=10.0, p50=60),
        sample("nginx", JSON_1, per_second=7.0, p50=11),
    ]  # fmt: skip
    grid = tables.throughput(tables.results(samples), "json", "t", "", [])
    rows = {line.name: line.values for line in grid.lines}
    assert rows["aiohttp, 32"]["x nginx"] == 0.2
    assert rows["aiohttp, 32"]["x LiteLLM"] == pytest.approx(100)
    assert rows["aiohttp, 32"]["added p50, µs"] == 50
    assert "CPU, µs" not in rows["direct, 32"]


def test_the_targets_of_small_json_are_met_or_missed_by_the_medians() -> None:
    """At 32 connections against nginx and LiteLLM; what is added, at one; without ours nothing is claimed."""
    samples = [
        *(sample("cloister", JSON_32, per_second=rate) for rate in (30.0, 31.0, 2.0)),
        sample("nginx", JSON_32, per_second=60.0), sample("LiteLLM", JSON_32, per_second=0.05),
        sample("direct", JSON_1, p50=15), sample("cloister", JSON_1, p50=135),
    ]  # fmt: skip
    outcomes = [target.outcome for target in tables.json_targets(tables.results(samples))]
    assert outcomes == ["Missed by 17 %: 0.5 x.", "Met: 600 x.", "Met: 0.12 ms.", "Met: 30 MB."]
    without = tables.json_targets(tables.results([one for one in samples if one.stack != "cloister"]))
    assert {target.outcome for target in without} == {"Not measured."}


def test_paced_streams_must_be_whole_quick_and_cheap() -> None:
    """The late chunk, the CPU beside nginx, and each stream complete."""
    measured = tables.results(
        [sample("nginx", PACED, cpu_us=100.0), sample("cloister", PACED, cpu_us=160.0, chunk_p99=900, good=127)]
    )
    assert [target.outcome for target in tables.paced_targets(measured, PACED)] == [
        "Met: 0.9 ms.", "Missed by 7 %: 1.6 x.",
    ]  # fmt: skip
    assert tables.thousand_targets(measured, [PACED]) == [
        Target("128 open streams at 50/s all complete", "Missed by 1 %: 99.2 % of them.")
    ]


def test_every_kind_of_request_is_whole_and_says_its_pace() -> None:
    """The length is that of the body, and the upstream knows the pace by `max_tokens`."""
    for kind, most in asking.MAX_TOKENS.items():
        head, _, body = asking.request(kind, ["Authorization: Bearer x"]).partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head.splitlines()
        assert b"Authorization: Bearer x" in head.splitlines()
        said = json.loads(body)
        assert (said["max_tokens"], said.get("stream", False)) == (most, kind != "json")
        assert kind == "json" or b'"stream":true' in body


def test_foreign_work_is_what_the_machine_did_beyond_ours() -> None:
    """Two busy cores, one of them ours: one foreign; clocks of different grain never give less than none."""
    assert Clocks(10, 4, 0).foreign_until(Clocks(14, 6, 2)) == 1
    assert Clocks(10, 4, 0).foreign_until(Clocks(10, 5, 2)) == 0
