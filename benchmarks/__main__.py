"""Measure Cloister beside the field, and write the results: `make bench`, `make bench ARGS=llm`.

Every table comes from interleaved rounds. Bounded to about five minutes, fifteen with `llm`, which is measured
when it is named: what takes too long on a slow machine gets fewer rounds, never another method.
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
from benchmarks.llm import part, programs, tokens
from benchmarks.microvm import images
from benchmarks.microvm import part as guests
from benchmarks.report import Grid, Host, Part, Section, markdown
from benchmarks.store import as_json, merged

ROUNDS = 40
BUDGET_S = 270.0
MODEL_CALLS = ("llm", "tls", "tokens")
"""Measured when they are named; `llm` stands for all three."""
APART = (*MODEL_CALLS, "microvm", "images")
"""Not measured unless they are named."""
ORDER = ("cold", "warm", "memory", "egress", "scale", *APART)
PAGE = (*ORDER, "units", "filter", "audit", "guest", "questions")
"""The parts of results.md in order. The last three are measured by root: `benchmarks/{units,audit}`."""


def main() -> int:
    """Measure everything, or what is named; return 1 when a part failed."""
    parser = argparse.ArgumentParser(prog="benchmarks", description="Measure Cloister beside the field.")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(ORDER)}; all but {', '.join(APART)} when none"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for results.md and .json")
    options = parser.parse_args()
    if os.geteuid() == 0:
        sys.exit("run by tools/bench: as root everything costs less, and Cloister is for ordinary users")
    parts, failed = measure(options.parts, options.rounds)
    names = {found.name for found in parts}
    own = peers.versions() if names - set(APART) else {}
    own |= guests.versions() if "microvm" in names else {}
    host = world.host({**own, **(programs.versions() if names & set(MODEL_CALLS) else {})})
    earlier = Path(__file__).with_name("results.json")
    host, parts = merged(earlier.read_text() if earlier.exists() else "", host, parts, PAGE)
    text = markdown(host, parts)
    (options.output / "results.md").write_text(text)
    (options.output / "results.json").write_text(as_json(host, parts))
    print(text)
    for process in memory.mine():
        print(f"left behind: {memory.command_of(process)}", file=sys.stderr)
    return failed


def keep(folder: Path, host: Host, part: Part) -> None:
    """Put a part that is measured by itself into the results of a folder, beside what others have measured."""
    earlier = folder / "results.json"
    host, parts = merged(earlier.read_text() if earlier.exists() else "", host, [part], PAGE)
    (folder / "results.md").write_text(markdown(host, parts))
    earlier.write_text(as_json(host, parts))


def measure(wanted: list[str], rounds: int) -> tuple[list[Part], int]:
    """Return all parts, and 1 when one could not be measured."""
    user = world.World("starts")
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    makers: dict[str, Callable[[], list[Section] | list[Grid] | list[Section | Grid]]] = {
        "cold": lambda: [starts.cold(user, rounds), starts.cold_cpu(user, rounds)],
        "warm": lambda: [starts.warm(user, rounds)],
        "memory": lambda: [memory.memory(user)],
        "egress": lambda: egress.egress(3),
        "scale": lambda: scale.scale(max(3, rounds // 5)),
        "llm": part.llm,
        "tls": part.tls,
        "tokens": tokens.tokens,
        "microvm": guests.microvm,
        "images": images.images,
    }
    chosen = set(wanted or ORDER) - (set() if wanted else set(APART))
    chosen |= set(MODEL_CALLS) if "llm" in chosen else set()
    parts: list[Part] = []
    failed, started = 0, time.monotonic()
    try:
        for name, make in makers.items():
            if name not in chosen:
                continue
            print(f"==> {name}", file=sys.stderr, flush=True)
            if name not in APART and time.monotonic() - started > BUDGET_S:
                print(f"no time left for {name}", file=sys.stderr)
                failed = 1
                continue
            try:
                parts.append(Part(name, date, make()))
            except Exception:  # noqa: BLE001  # the other parts still tell something; this one is reported as failed
                traceback.print_exc()
                failed = 1
    finally:
        user.close()
    return parts, failed


if __name__ == "__main__":
    sys.exit(main())
