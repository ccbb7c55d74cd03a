"""Results as JSON for programs, and what earlier runs measured: a part that is not measured again is kept. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.figures import Figure, Missing
from benchmarks.report import Grid, Host, Line, Part, Section, Target


def as_json(host: Host, parts: Sequence[Part]) -> str:
    """Return everything as JSON."""
    shown = [{**part._asdict(), "sections": [_shown(section) for section in part.sections]} for part in parts]
    return json.dumps({"host": host._asdict(), "parts": shown}, indent=2) + "\n"


def merged(earlier: str, host: Host, parts: Sequence[Part], order: Sequence[str]) -> tuple[Host, list[Part]]:
    """Return what was measured now, with the other parts of an earlier file, and versions of both.

    Figures of another machine are not kept beside those of this one.
    """
    old = json.loads(earlier) if earlier else {"parts": []}
    fresh = {part.name: part for part in parts}
    if not old["parts"] or _machine(Host(**old["host"])) != _machine(host):
        return host, list(parts)
    known = {part["name"]: _part(part) for part in old["parts"]} | fresh
    versions = {**old["host"]["versions"], **host.versions}
    return host._replace(versions=versions), [known[name] for name in order if name in known]


def _machine(host: Host) -> Host:
    return host._replace(versions={})


def _shown(section: Section | Grid) -> dict[str, Any]:
    if isinstance(section, Section):
        return {**section._asdict(), "rows": [row._asdict() for row in section.rows]}
    return {
        **section._asdict(),
        "lines": [line._asdict() for line in section.lines],
        "targets": [target._asdict() for target in section.targets],
    }


def _part(shown: dict[str, Any]) -> Part:
    return Part(shown["name"], shown["date"], [_section(section) for section in shown["sections"]])


def _section(shown: dict[str, Any]) -> Section | Grid:
    if "unit" in shown:
        return Section(**{**shown, "rows": [_one(Figure, row) for row in shown["rows"]]})
    lines = [_one(Line, line) for line in shown["lines"]]
    return Grid(**{**shown, "lines": lines, "targets": [Target(**target) for target in shown["targets"]]})


def _one(kind: type[Figure | Line], shown: dict[str, Any]) -> Any:
    return Missing(**shown) if "reason" in shown else kind(**shown)
