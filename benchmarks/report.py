"""Results as Markdown for people and as JSON for programs. Pure: measures and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.figures import Figure, Missing

PREFACE = """\
Made by `make bench`; run it to make it again (five minutes at most, as an ordinary user, traffic on loopback and
between namespaces only). The rows of a table were measured in turn, round by round, so compare ratios and not absolute
numbers: the machine was shared with other work. The minimum is the cost of the thing itself, the median what a person
meets; `min x` and `median x` are both against the first row."""


class Section(NamedTuple):
    """One table: what was measured, in which unit, the target and what came of it."""

    title: str
    unit: str
    rows: Sequence[Figure | Missing]
    note: str = ""
    target: str = ""
    outcome: str = ""
    """Where the target was met or missed, by how much, and what the time goes to."""


class Host(NamedTuple):
    """What a reader must know of the machine; nothing that names it."""

    kernel: str
    processor: str
    cores: int
    memory_gib: int
    system: str
    versions: dict[str, str]


def markdown(host: Host, sections: Sequence[Section], date: str) -> str:
    """Return the page `benchmarks/results.md`."""
    system = f"{host.system}, Linux {host.kernel}, {host.cores} cores of {host.processor}, {host.memory_gib} GiB"
    versions = ", ".join(f"{name} {version}" for name, version in host.versions.items())
    lines = ["# Benchmarks", "", PREFACE, "", f"{date}: {system}.", "", f"Compared: {versions}."]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        if section.note:
            lines += [section.note, ""]
        lines += table(section.rows, section.unit)
        if section.target:
            lines += ["", f"Target: {section.target}. {section.outcome}".rstrip()]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Figure | Missing], unit: str) -> list[str]:
    """Return the lines of one table; what is missing stands in it with its reason."""
    lines = [f"| | min, {unit} | median, {unit} | min x | median x | rounds |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        if isinstance(row, Missing):
            lines.append(f"| {row.name} | not measured: {row.reason} | | | | |")
        else:
            cells = (number(row.minimum), number(row.median), number(row.ratio_of_minima), number(row.ratio_of_medians))
            lines.append(f"| {row.name} | " + " | ".join(cells) + f" | {row.rounds} |")
    return lines


def number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - _magnitude(abs(value)))
    return f"{value:.{digits}f}"


def _magnitude(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def as_json(host: Host, sections: Sequence[Section], date: str) -> str:
    """Return everything as JSON."""
    shown = [
        {**section._asdict(), "rows": [row._asdict() for row in section.rows]}
        for section in sections
    ]  # fmt: skip
    return json.dumps({"date": date, "host": host._asdict(), "sections": shown}, indent=2) + "\n"
