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
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from benchmarks import world
from benchmarks.__main__ import keep
from benchmarks.report import Grid, Line, Part, Target, markdown
from tests.support.audit_log import START_NS, Writer, busy_day, pack_segment, run_ids

from cloister.audit.question import Question, resolve
from cloister.cli.audit_options import index_of
from cloister.runs.audit_log import AuditLog

EVENTS = 10_000_000
PER_SEGMENT = 160_000
"""Some 64 MiB, where the keeper ends a segment."""
ROUNDS = 5
NEWEST = 200
STORE = ["events", "log, MB", "index, MB", "building it, s", "events/s of CPU time", "looking for more, ms"]
ASKED = ["meant", "newest, first, ms", "newest, median, ms", "counted, ms", "command, ms"]
_NS = 1_000_000_000
_STEP_NS = 400_000
"""Between two events of `busy_day`."""


def main() -> None:
    """Measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(prog="benchmarks.audit.query", description=__doc__)
    parser.add_argument("events", nargs="?", type=int, default=EVENTS)
    parser.add_argument("--directory", default="", help="where the log is made, and kept; else a temporary one")
    parser.add_argument(
        "--output", type=Path, default=None, help="folder of results.md and .json to put the tables into"
    )
    options = parser.parse_args()
    directory = Path(options.directory or tempfile.mkdtemp(prefix="cloister-audit-"))
    try:
        part = measure(directory, options.events)
    finally:
        if not options.directory:
            shutil.rmtree(directory)
    host = world.host({})
    if options.output:
        keep(options.output, host, part)
    print(markdown(host, [part]))


def measure(directory: Path, events: int) -> Part:
    """Make what is not there yet, and return what was measured."""
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
    figures = (events, size / 1e6, held / 1e6, took, events / busy, again * 1000)
    store = Grid(
        "Audit: the index of a log", STORE, [Line("all", dict(zip(STORE, figures, strict=True)))],
        "Closed segments are packed, as their keeper does. The index is built once, and follows the log from then on.",
    )  # fmt: skip
    lines = [row(log, str(log_at), *one) for one in questions(events)]
    slowest = max(line.values["newest, median, ms"] for line in lines)
    asked = Grid(
        "Audit: questions to that log", ASKED, lines,
        f"Newest: the newest {NEWEST} that are meant, the first time (from the disk) and the median of {ROUNDS}. "
        "Counted: how many there are, by kind. Command: `cloister audit query`, in a process of its own.",
        [Target("fast at 10 million events", f"The slowest question takes {slowest:.0f} ms (newest, median).")],
    )  # fmt: skip
    return Part("questions", datetime.now(UTC).strftime("%Y-%m-%d"), [store, asked])


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


def row(log: AuditLog, directory: str, name: str, question: Question, words: list[str]) -> Line:
    """Ask one question in three ways, and return the row."""
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
    return Line(name, dict(zip(ASKED, (meant, first, median, counted, command), strict=True)))


if __name__ == "__main__":
    main()
