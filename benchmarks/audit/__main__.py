"""Measure kernel events: `make bench ARGS=audit`, as root; `--quick` makes few rounds and writes nothing.

The latency of questions to a log is a program of its own, `benchmarks.audit.query`: its log takes long to make.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import world
from benchmarks.__main__ import keep
from benchmarks.audit import kernel
from benchmarks.report import Part, markdown

from cloister.host import kernel_watches

NAME = "audit"
ROUNDS, QUICK = 7, 1
BUSY = 1.0
"""Load average from which a machine does not count as quiet."""


def main() -> int:
    """Measure, write the results, and print them."""
    parser = argparse.ArgumentParser(prog="benchmarks.audit", description="Measure kernel events.")
    parser.add_argument("--quick", action="store_true", help="few rounds, results on standard output only")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1], help="folder of results.md and .json")
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("run as root: programs are loaded into the kernel")
    part = measure(options.rounds or (QUICK if options.quick else ROUNDS))
    host = world.host({"strace": ["strace", "--version"], "bpftrace": ["bpftrace", "--version"]})
    if not options.quick:
        keep(options.output, host, part)
    print(markdown(host, [part]))
    return 0


def measure(rounds: int) -> Part:
    """Return all tables, from programs in a cgroup of our own."""
    before = os.getloadavg()[0]
    cgroup = Path(kernel_watches.cgroup_tree()) / f"cloister-bench-{os.getpid()}"
    cgroup.mkdir()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            loads = kernel.Loads(folder, cgroup)
            overhead = kernel.overhead(loads, folder, rounds)
            sections = [overhead, kernel.chained(folder), kernel.flooded(loads, folder), kernel.slowed(loads, folder)]
    finally:
        cgroup.rmdir()
    if before >= BUSY:
        note = f"{overhead.note} Not a quiet machine: load {before:.1f} when this began."
        sections[0] = overhead._replace(note=note)
    return Part(NAME, datetime.now(UTC).strftime("%Y-%m-%d"), sections)


if __name__ == "__main__":
    sys.exit(main())
