"""Figures of repeated measurements and what may be said of them: minima, medians, ratios.

Pure. A shared machine only ever adds time, so the minimum is the cost of the thing itself and the
median what a person meets; both are compared within one interleaved run, never across runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """One row of a table: a name, its samples' minimum and median, and both against the row it is compared with."""

    name: str
    minimum: float
    median: float
    ratio_of_minima: float
    ratio_of_medians: float
    rounds: int


class Missing(NamedTuple):
    """A row that could not be measured, and why: a peer that is not installed is named, never made up."""

    name: str
    reason: str


def compare(samples: Mapping[str, Sequence[float]], base: str) -> list[Figure]:
    """Return a figure for each name, against `base`, in the order given; names without samples are left out.

    Raises:
        ValueError: there is nothing to compare with.
    """
    if not samples.get(base):
        raise ValueError(f"no sample of {base!r} to compare with")
    low, middle = min(samples[base]), statistics.median(samples[base])
    return [
        Figure(
            name, min(values), statistics.median(values), min(values) / low, statistics.median(values) / middle,
            len(values),
        )
        for name, values in samples.items()
        if values
    ]  # fmt: skip


def interleave(cases: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Call every case once per round, so that a slow minute hits all of them; the first rounds do not count."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + warm_up):
        for name, case in cases.items():
            value = case()
            if number >= warm_up:
                samples[name].append(value)
    return samples
