"""What samples say: tables of medians, ratios to nginx and LiteLLM, and the targets of DESIGN section 13. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.figures import Missing
from benchmarks.llm.cells import Cell, Sample, counting, middle
from benchmarks.llm.names import AIOHTTP, DIRECT, LITELLM, NGINX, OURS
from benchmarks.report import Grid, Line, Target

NAMES = (DIRECT, NGINX, OURS, AIOHTTP, LITELLM)
OF_NGINX, OF_LITELLM, ADDED_MS, MEMORY_MB = 0.6, 300.0, 0.15, 40.0
CHUNK_MS, CPU_OF_NGINX = 1.0, 1.5


class Middle(NamedTuple):
    """The medians of the samples of one proxy under one load."""

    per_second: float
    p50_us: float
    p99_us: float
    first_p50_us: float
    first_p99_us: float
    chunk_p50_us: float
    chunk_p99_us: float
    cpu_us: float
    memory_mb: float
    good: int
    bad: int
    others: float
    """Cores that others kept busy meanwhile."""
    rounds: int


Results = dict[Cell, dict[str, Middle]]


def results(samples: Sequence[Sample]) -> Results:
    """Return the medians by load and proxy."""
    grouped: dict[Cell, dict[str, list[Sample]]] = {}
    for sample in samples:
        grouped.setdefault(sample.cell, {}).setdefault(sample.stack, []).append(sample)
    return {cell: {name: _middle(counting(taken)) for name, taken in by.items()} for cell, by in grouped.items()}


def _middle(samples: Sequence[Sample]) -> Middle:
    def of(value: Callable[[Sample], float]) -> float:
        return middle([value(sample) for sample in samples])

    return Middle(
        of(lambda s: s.load.per_second), of(lambda s: s.load.p50), of(lambda s: s.load.p99),
        of(lambda s: s.load.first_p50), of(lambda s: s.load.first_p99), of(lambda s: s.load.chunk_p50),
        of(lambda s: s.load.chunk_p99), of(lambda s: s.cpu_us), of(lambda s: s.memory_mb),
        int(of(lambda s: s.load.good)),
        max(s.load.finished - s.load.good for s in samples),
        of(lambda s: s.foreign), len(samples),
    )  # fmt: skip


def _in_order(by: dict[str, Middle]) -> list[tuple[str, Middle]]:
    return [(name, by[name]) for name in NAMES if name in by]


def _ratios(value: float, by: dict[str, float]) -> dict[str, float]:
    return {f"x {name}": value / by[name] for name in (NGINX, LITELLM) if by.get(name)}


def throughput(measured: Results, kind: str, title: str, note: str, missing: Sequence[Missing]) -> Grid:
    """Return the table of a closed loop: how many a second, how long each takes, what it costs."""
    unit = "requests" if kind == "json" else "streams"
    columns = (
        f"{unit}/s", "p50, µs", "p99, µs", "first byte p50, µs", "added p50, µs", "added p99, µs", "CPU, µs",
        "x nginx", "x LiteLLM",
        "memory, MB", "failed", "others, cores", "rounds",
    )  # fmt: skip
    lines: list[Line | Missing] = []
    for cell, by in measured.items():
        if cell.kind != kind:
            continue
        rates = {name: found.per_second for name, found in by.items()}
        for name, found in _in_order(by):
            values = {
                f"{unit}/s": found.per_second, "p50, µs": found.p50_us, "p99, µs": found.p99_us,
                "first byte p50, µs": found.first_p50_us, "failed": found.bad,
                "others, cores": found.others, "rounds": found.rounds,
            }  # fmt: skip
            if name != DIRECT:
                values |= {"CPU, µs": found.cpu_us, "memory, MB": found.memory_mb, **_ratios(found.per_second, rates)}
                if DIRECT in by:
                    values["added p50, µs"] = found.p50_us - by[DIRECT].p50_us
                    values["added p99, µs"] = found.p99_us - by[DIRECT].p99_us
            lines.append(Line(f"{name}, {cell.connections}", values))
    return Grid(title, columns, [*lines, *missing], note)


def paced(measured: Results, cells: Sequence[Cell], title: str, note: str, missing: Sequence[Missing]) -> Grid:
    """Return the table of streams that arrive at the pace of a model."""
    columns = (
        "complete", "failed", "chunk p50, µs", "chunk p99, µs", "first byte p50, ms", "first byte p99, ms",
        "CPU, ms per stream", "CPU x nginx", "memory, MB", "others, cores", "rounds",
    )  # fmt: skip
    lines: list[Line | Missing] = []
    for cell in cells:
        by = measured.get(cell, {})
        for name, found in _in_order(by):
            values = {
                "complete": found.good, "failed": found.bad, "chunk p50, µs": found.chunk_p50_us,
                "chunk p99, µs": found.chunk_p99_us, "first byte p50, ms": found.first_p50_us / 1000,
                "first byte p99, ms": found.first_p99_us / 1000, "others, cores": found.others, "rounds": found.rounds,
            }  # fmt: skip
            if name != DIRECT:
                values |= {"CPU, ms per stream": found.cpu_us / 1000, "memory, MB": found.memory_mb}
                values |= {"CPU x nginx": found.cpu_us / by[NGINX].cpu_us} if NGINX in by else {}
            pace = "50/s" if cell.kind == "paced" else "10/s"
            lines.append(Line(f"{name}, {cell.connections} at {pace}", values))
    return Grid(title, columns, [*lines, *missing], note)


def json_targets(measured: Results) -> list[Target]:
    """Return what DESIGN section 13 asks of small JSON, and what came of it."""
    at = {cell.connections: by for cell, by in measured.items() if cell.kind == "json"}
    one, many = at.get(1, {}), at.get(32, {})
    found = many.get(OURS)
    most = max((by[OURS].memory_mb for by in at.values() if OURS in by), default=0.0)
    ratio = {name: found.per_second / many[name].per_second for name in (NGINX, LITELLM) if found and name in many}
    added = (one[OURS].p50_us - one[DIRECT].p50_us) / 1000 if OURS in one and DIRECT in one else None
    return [
        least(f"≥ {OF_NGINX:g} x nginx at 32 connections", ratio.get(NGINX), OF_NGINX, "x"),
        least(f"≥ {OF_LITELLM:g} x LiteLLM at 32 connections", ratio.get(LITELLM), OF_LITELLM, "x"),
        most_of(f"added p50 ≤ {ADDED_MS:g} ms at one connection", added, ADDED_MS, "ms"),
        most_of(f"≤ {MEMORY_MB:g} MB", most or None, MEMORY_MB, "MB"),
    ]


def paced_targets(measured: Results, cell: Cell) -> list[Target]:
    """Return what is asked of 128 paced streams."""
    by = measured.get(cell, {})
    found, floor = by.get(OURS), by.get(NGINX)
    cpu = found.cpu_us / floor.cpu_us if found and floor else None
    return [
        most_of(f"chunk p99 ≤ {CHUNK_MS:g} ms", found and found.chunk_p99_us / 1000, CHUNK_MS, "ms"),
        most_of(f"CPU ≤ {CPU_OF_NGINX:g} x nginx", cpu, CPU_OF_NGINX, "x"),
    ]


def thousand_targets(measured: Results, cells: Sequence[Cell]) -> list[Target]:
    """Return whether a thousand open streams all came to their end."""
    targets = []
    for cell in cells:
        found = measured.get(cell, {}).get(OURS)
        share = found and 100 * found.good / cell.connections
        pace = "50/s" if cell.kind == "paced" else "10/s"
        targets.append(least(f"{cell.connections} open streams at {pace} all complete", share, 100.0, "% of them"))
    return targets


def least(wanted: str, reached: float | None, target: float, unit: str) -> Target:
    """Say whether a value is large enough."""
    if reached is None:
        return Target(wanted, "Not measured.")
    if reached >= target:
        return Target(wanted, f"Met: {reached:.3g} {unit}.")
    return Target(wanted, f"Missed by {(1 - reached / target) * 100:.0f} %: {reached:.3g} {unit}.")


def most_of(wanted: str, reached: float | None, target: float, unit: str) -> Target:
    """Say whether a value is small enough."""
    if reached is None:
        return Target(wanted, "Not measured.")
    if reached <= target:
        return Target(wanted, f"Met: {reached:.3g} {unit}.")
    return Target(wanted, f"Missed by {(reached / target - 1) * 100:.0f} %: {reached:.3g} {unit}.")
