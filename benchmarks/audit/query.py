"""How fast a log of many events answers: `python -m benchmarks.audit.query [EVENTS] [--directory DIR]`.

Makes a log (40 runs of four agents, several at a time), packs its closed segments as their keeper does, builds the
index, and asks each question as `cloister audit` does: the newest 200 that are meant, how many there are, and once more
in a process of its own with Python's start. Median of several; the first one, which reads from the disk, is beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from tests.support.audit_log import START_NS, Writer, busy_day, pack_segment, run_ids

from cloister.audit.question import Question, resolve
from cloister.cli.audit_options import index_of
from cloister.runs.audit_log import AuditLog

EVENTS = 10_000_000
PER_SEGMENT = 160_000
"""Some 64 MiB, where the keeper ends a segment."""
ROUNDS = 5
NEWEST = 200
_NS = 1_000_000_000
_STEP_NS = 400_000
"""Between two events of `busy_day`."""


def main() -> None:
    """Measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(prog="benchmarks.audit.query", description=__doc__)
    parser.add_argument("events", nargs="?", type=int, default=EVENTS)
    parser.add_argument("--directory", default="", help="where the log is made, and kept; else a temporary one")
    options = parser.parse_args()
    directory = Path(options.directory or tempfile.mkdtemp(prefix="cloister-audit-"))
    try:
        measure(directory, options.events)
    finally:
        if not options.directory:
            shutil.rmtree(directory)


def measure(directory: Path, events: int) -> None:
    """Make what is not there yet, and measure."""
    log_at = directory / "log"
    index = Path(index_of(str(log_at), f"{directory}/state/cloister"))
    if not log_at.exists():
        make(log_at, events)
    size = sum(path.stat().st_size for path in log_at.iterdir())
    for end in ("", "-wal", "-shm", ".lock"):
        Path(f"{index}{end}").unlink(missing_ok=True)
    log = AuditLog(str(log_at), str(index))
    began, cpu = time.monotonic(), time.process_time()
    log.refresh()
    took, busy = time.monotonic() - began, time.process_time() - cpu
    began = time.monotonic()
    log.refresh()
    again = time.monotonic() - began
    held = index.stat().st_size
    print(f"| {events:,} events | |\n|---|---|")
    print(f"| log on the disk, closed segments packed | {size / 1e6:,.0f} MB |")
    print(f"| index | {held / 1e6:,.0f} MB, {held / events:.1f} bytes an event |")
    print(f"| building it | {took:,.0f} s, {events / took:,.0f} events/s ({events / busy:,.0f} per second of CPU) |")
    print(f"| looking whether there is something new | {again * 1000:.0f} ms |\n")
    print(f"| question | meant | newest {NEWEST}: first, median | count: median | as a command |")
    print("|---|---|---|---|---|")
    for name, question, words in questions(events):
        row(log, str(log_at), name, question, words)


def make(directory: Path, events: int) -> None:
    """Write the log; all but the newest segment are packed."""
    writer = Writer(directory, per_segment=PER_SEGMENT)
    writer.write_fields(busy_day(events))
    for path in sorted(directory.glob("*.jsonl"))[:-1]:
        pack_segment(path)


def questions(events: int) -> list[tuple[str, Question, list[str]]]:
    """Return what is asked, as a value and as options."""
    run = run_ids(40)[20]
    middle = START_NS + events * _STEP_NS // 2
    path = f"/home/alice/src/app/node_modules/pkg{events // 4000}/lib/file{events // 100}.js"
    since, until = middle / _NS, (middle + 10 * _NS) / _NS
    moment = [time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)) for second in (since, until)]
    return [
        ("one run", Question(runs=(run,)), ["--run", run]),
        ("one agent", Question(agents=("pi",)), ["--agent", "pi"]),
        ("a rare kind", Question(kinds=("process.traced",)), ["--kind", "process.traced"]),
        ("a class (OCSF 1007)", Question(kinds=resolve(("1007",))), ["--kind", "1007"]),
        ("ten seconds in the middle", Question(since=middle, until=middle + 10 * _NS),
         ["--since", moment[0], "--until", moment[1]]),
        ("one path", Question(paths=(path,)), ["--path", path]),
        ("a path by its end", Question(paths=(f"*/file{events // 100}.js",)), ["--path", f"*/file{events // 100}.js"]),
        ("one host", Question(hosts=("github.com",)), ["--host", "github.com"]),
        ("what was refused of one run at one host",
         Question(runs=(run,), hosts=("github.com",), decisions=("blocked",)),
         ["--run", run, "--host", "github.com", "--decision", "blocked"]),
        ("severity medium and above", Question(severity=3), ["--severity", "medium"]),
        ("nothing has this host", Question(hosts=("nowhere.example",)), ["--host", "nowhere.example"]),
    ]  # fmt: skip


def row(log: AuditLog, directory: str, name: str, question: Question, words: list[str]) -> None:
    """Ask one question in three ways, and print the row."""
    newest, counts, commands = [], [], []
    meant = 0
    for _ in range(ROUNDS):
        began = time.perf_counter()
        list(islice(log.find(question, newest_first=True), NEWEST))
        newest.append(time.perf_counter() - began)
        began = time.perf_counter()
        meant = sum(log.count(question, "kind").values())
        counts.append(time.perf_counter() - began)
    state = Path(directory).parent / "state"
    environment = {**os.environ, "XDG_STATE_HOME": str(state), "PYTHONPATH": "src"}
    argv = [sys.executable, "-m", "cloister", "audit", "query", "--log", directory, *words]
    for _ in range(ROUNDS):
        began = time.perf_counter()
        subprocess.run(argv, env=environment, check=True, stdout=subprocess.DEVNULL)
        commands.append(time.perf_counter() - began)
    first, median = newest[0] * 1000, statistics.median(newest) * 1000
    counted, command = statistics.median(counts) * 1000, statistics.median(commands) * 1000
    print(f"| {name} | {meant:,} | {first:.0f} ms, {median:.0f} ms | {counted:.0f} ms | {command:.0f} ms |", flush=True)


if __name__ == "__main__":
    main()
