"""Measure Cloister beside the field, and write the results: `make bench`.

Every table comes from interleaved rounds. Bounded to about five minutes: what takes too long on a
slow machine gets fewer rounds, never another method.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import egress, memory, peers, scale, starts, world
from benchmarks.report import Section, as_json, markdown

ROUNDS = 40
BUDGET_S = 270.0


def main() -> int:
    """Measure everything, or what is named; return 1 when a part failed."""
    parser = argparse.ArgumentParser(prog="benchmarks", description="Measure Cloister beside the field.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="cold, warm, memory, egress, scale; all when none")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for results.md and .json")
    options = parser.parse_args()
    if os.geteuid() == 0:
        sys.exit("run by tools/bench: as root everything costs less, and Cloister is for ordinary users")
    sections, failed = measure(options.parts, options.rounds)
    host = world.host(peers.versions())
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    text = markdown(host, sections, date)
    (options.output / "results.md").write_text(text)
    (options.output / "results.json").write_text(as_json(host, sections, date))
    print(text)
    for process in memory.mine():
        print(f"left behind: {memory.command_of(process)}", file=sys.stderr)
    return failed


def measure(wanted: list[str], rounds: int) -> tuple[list[Section], int]:
    """Return the sections of all parts, and 1 when one could not be measured."""
    user = world.World("starts")
    parts: dict[str, Callable[[], list[Section]]] = {
        "cold": lambda: [starts.cold(user, rounds), starts.cold_cpu(user, rounds)],
        "warm": lambda: [starts.warm(user, rounds)],
        "memory": lambda: [memory.memory(user)],
        "egress": lambda: egress.egress(3),
        "scale": lambda: scale.scale(max(3, rounds // 5)),
    }
    sections: list[Section] = []
    failed, started = 0, time.monotonic()
    try:
        for name, part in parts.items():
            if wanted and name not in wanted:
                continue
            print(f"==> {name}", file=sys.stderr, flush=True)
            if time.monotonic() - started > BUDGET_S:
                print(f"no time left for {name}", file=sys.stderr)
                failed = 1
                continue
            try:
                sections += part()
            except Exception:  # noqa: BLE001  # the other parts still tell something; this one is reported as failed
                traceback.print_exc()
                failed = 1
    finally:
        user.close()
    return sections, failed


if __name__ == "__main__":
    sys.exit(main())
