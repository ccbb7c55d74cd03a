"""Results as Markdown for people. Pure: measures and writes nothing; `store.py` keeps them as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.figures import Figure, Missing

PREFACE = """\
Made by `make bench` (five minutes at most) and `make bench ARGS=llm` (fifteen), as an ordinary user, traffic on
loopback and between namespaces only; by `make bench ARGS=units` (ten), as root, in machines of its own; and by
`make bench ARGS=audit` (four; `ARGS="audit guest"` three, `ARGS="audit query"` ten), as root; by
`make bench ARGS=microvm` (ten) and `make bench ARGS=images` (three), as an ordinary user. Run them to make it
again. What was not measured again is kept, with its date.
The rows of a table were measured in turn, round by round, so compare ratios and not absolute numbers: the machine was
shared with other work. The minimum is the cost of the thing itself, the median what a person meets; `min x` and
`median x` are both against the first row."""


class Section(NamedTuple):
    """One table of one quantity: what was measured, in which unit, the target and what came of it."""

    title: str
    unit: str
    rows: Sequence[Figure | Missing]
    note: str = ""
    target: str = ""
    outcome: str = ""
    """Where the target was met or missed, by how much, and what the time goes to."""


class Line(NamedTuple):
    """One row of a grid: values by column. A column it has no value for stays empty."""

    name: str
    values: Mapping[str, float]


class Target(NamedTuple):
    """What should be reached, and what came of it."""

    wanted: str
    outcome: str


class Grid(NamedTuple):
    """One table of several quantities, each in a column that names its unit."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Line | Missing]
    note: str = ""
    targets: Sequence[Target] = ()


class Part(NamedTuple):
    """What was measured together, and when."""

    name: str
    date: str
    sections: Sequence[Section | Grid]


class Host(NamedTuple):
    """What a reader must know of the machine; nothing that names it."""

    kernel: str
    processor: str
    cores: int
    memory_gib: int
    system: str
    versions: dict[str, str]


def markdown(host: Host, parts: Sequence[Part]) -> str:
    """Return the page `benchmarks/results.md`."""
    newest = max((part.date for part in parts), default="")
    system = f"{host.system}, Linux {host.kernel}, {host.cores} cores of {host.processor}, {host.memory_gib} GiB"
    versions = ", ".join(f"{name} {version}" for name, version in host.versions.items())
    lines = ["# Benchmarks", "", PREFACE, "", f"{newest}: {system}.", "", f"Compared: {versions}."]
    for part in parts:
        for section in part.sections:
            lines += ["", f"## {section.title}", ""]
            if part.date != newest:
                lines += [f"Measured on {part.date}.", ""]
            if section.note:
                lines += [section.note, ""]
            lines += _section(section) if isinstance(section, Section) else _grid(section)
    return "\n".join(lines) + "\n"


def _section(section: Section) -> list[str]:
    said = ["", f"Target: {section.target}. {section.outcome}".rstrip()] if section.target else []
    return table(section.rows, section.unit) + said


def _grid(grid: Grid) -> list[str]:
    lines = [f"| | {' | '.join(grid.columns)} |", "|---|" + "--:|" * len(grid.columns)]
    for line in grid.lines:
        if isinstance(line, Missing):
            cells = [f"not measured: {line.reason}", *[""] * (len(grid.columns) - 1)]
        else:
            cells = [_cell(line.values.get(column)) for column in grid.columns]
        lines.append(f"| {line.name} | {' | '.join(cells)} |")
    for target in grid.targets:
        lines += ["", f"Target: {target.wanted}. {target.outcome}"]
    return lines


def _cell(value: float | None) -> str:
    """Return a measured value in three digits, a count as it is."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else number(value)


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
