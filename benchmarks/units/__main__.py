"""Measure runs under systemd, on machines that the tests boot: `make bench ARGS=units`, as root.

Debian 12 and 13, each with a systemd as PID 1 in namespaces of its own. `--quick` makes few rounds, writes nothing and
shows whether everything works; figures for results.md want a quiet machine, which is said there where it was not.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import world
from benchmarks.__main__ import PAGE
from benchmarks.report import Grid, Part, Section, markdown
from benchmarks.store import as_json, merged
from benchmarks.units import load, starts
from benchmarks.units.machine import Rig, scratch

from support import machines

NAME = "units"
ROUNDS, QUICK = 40, 4
BUSY = 1.0
"""Load average from which a machine does not count as quiet."""


def main() -> int:
    """Measure, and write the results; return 1 when the machine was not quiet."""
    parser = argparse.ArgumentParser(prog="benchmarks.units", description="Measure runs under systemd.")
    parser.add_argument("--quick", action="store_true", help="few rounds, results on standard output only")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--suite", action="append", choices=machines.SUITES)
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("run as root: machines are booted")
    rounds = options.rounds or (QUICK if options.quick else ROUNDS)
    before = os.getloadavg()[0]
    sections: list[Section | Grid] = []
    with scratch() as folder:
        wheel = machines.wheel(Path(folder))
        for suite in options.suite or machines.SUITES:
            with Rig(suite, Path(folder) / suite, wheel) as rig:
                sections += measure(rig, rounds, quick=options.quick)
    part = Part(NAME, datetime.now(UTC).strftime("%Y-%m-%d"), [_honest(sections[0], before), *sections[1:]])
    host = world.host({"git": ["git", "--version"]})
    if not options.quick:
        page = Path(__file__).parents[1]
        earlier = page / "results.json"
        merged_host, parts = merged(earlier.read_text() if earlier.exists() else "", host, [part], PAGE)
        (page / "results.md").write_text(markdown(merged_host, parts))
        earlier.write_text(as_json(merged_host, parts))
    print(markdown(host, [part]))
    return 0


def measure(rig: Rig, rounds: int, *, quick: bool) -> list[Section | Grid]:
    """Return all tables of one machine."""
    found: list[Section | Grid] = []
    for name, make in (
        ("starts", lambda: starts.starts(rig, rounds)),
        ("stages", lambda: starts.stages(rig, max(3, rounds // 2))),
        ("by property", lambda: starts.by_property(rig, 2 if quick else max(3, rounds // 2))),
        ("crowd", lambda: load.crowd(rig)),
        ("memory", lambda: load.memory(rig, patient=not quick)),
    ):
        print(f"==> {rig.name}: {name}", file=sys.stderr, flush=True)
        found.append(make())
    return found


def _honest(section: Section | Grid, load_before: float) -> Section | Grid:
    """Say in the first table when the machine was not quiet."""
    if load_before < BUSY:
        return section
    return section._replace(note=f"{section.note} Not a quiet machine: load {load_before:.1f} when this began.")


if __name__ == "__main__":
    sys.exit(main())
