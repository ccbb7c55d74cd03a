"""`cloister logs`: what a run printed, or what happened to it, one event per line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.errors import UsageError
from cloister.host import gateway_manager
from cloister.plan.vm import CONSOLE
from cloister.runs import gateways
from cloister.runs.store import Store

POLL_S = 0.2
_CHUNK = 1 << 16
_JOURNAL_LINES = 200


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "logs",
        "Show the output or the events of a run.",
        prose=(
            "The output of a run is on record when it was started with --detach; without it, the events are shown: "
            "egress decisions, answers to questions, policy changes. Escape sequences and control characters in the "
            "output are left out, unless --raw writes it, byte for byte, to something that is no terminal. "
            "The name of a gateway (SERVICE, for all of its instances, or SERVICE/INSTANCE) shows the end of its "
            "journal, to root and the group systemd-journal."
        ),
        examples=(
            ("cloister logs -f last", "follow the newest run"),
            ("cloister logs --events last", "what it tried to reach"),
            ("sudo cloister logs -f home/work", "follow a gateway"),
        ),
    )
    verb.run_argument()
    verb.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    which = verb.add_mutually_exclusive_group()
    which.add_argument("--events", action="store_true", help="show events, also where there is output")
    which.add_argument("--output", action="store_true", help="show output, or fail where none was kept")
    which.add_argument("--console", action="store_true", help="show what the guest of a microVM printed")
    verb.add_argument("--raw", action="store_true", help="output byte for byte; not onto a terminal")
    verb.add_argument("--json", action="store_true", help="events as recorded: one JSON object per line, key `event`")
    return verb


def main(argv: list[str]) -> int:
    """Print, and follow when asked to.

    Raises:
        UsageError: no such run, no output on record, or raw output onto a terminal.
    """
    options = parser().read(argv)
    if units := gateways.units_of_word(options.run):
        return gateway_manager.show_journal(units, follow=options.follow, lines=_JOURNAL_LINES)
    store = records.store()
    run = store.find(options.run)
    has_output = Path(store.output_path(run)).exists()
    if options.output and not has_output:
        remedy = f"cloister logs --events {run}; start with --detach to keep output"
        raise UsageError("output-not-kept", f"the output of {run} went to its terminal", remedy=remedy)
    if options.raw and output.is_terminal():
        raise UsageError(
            "raw-terminal", "raw output may hold sequences that control a terminal", remedy="| less, or > FILE"
        )
    events = not options.console and (options.events or options.json or not has_output)
    path = _console(store, run) if options.console else store.events_path(run) if events else store.output_path(run)
    for data in _chunks(path, store, run, follow=options.follow):
        if options.raw or options.json:
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            text = _events(data) if events else output.clean_lines(data.decode("utf-8", "replace"))
            print(text, end="", flush=options.follow)
    return 0


def _console(store: Store, run: str) -> str:
    """Return where the console of a run's guest is: in its directory while it lives, else in its records.

    Raises:
        UsageError: the run has no guest, or that printed nothing.
    """
    plan = store.plan(run)
    vm = plan.launch.vm if plan else None
    if vm is None:
        raise UsageError("console-missing", f"the run {run} has no guest", remedy=f"cloister logs {run}")
    for path in (f"{vm.directory}/{CONSOLE}", store.console_path(run)):
        if Path(path).is_file() and not Path(path).is_symlink():  # its monitor could put one there
            return path
    raise UsageError("console-missing", f"the guest of {run} printed nothing", remedy=f"cloister logs --events {run}")


def _chunks(path: str, store: Store, run: str, *, follow: bool) -> Iterator[bytes]:
    """Yield what is in a file, whole lines at a time where there are any; then what is added while the run lasts."""
    rest = b""
    with Path(path).open("rb") as file:
        while True:
            over = not follow or not _alive(store, run)  # asked before reading, so that nothing is missed
            while data := file.read(_CHUNK):
                head, newline, rest = (rest + data).rpartition(b"\n")
                if newline:
                    yield head + newline
            if over:
                break
            time.sleep(POLL_S)
    if rest:
        yield rest


def _alive(store: Store, run: str) -> bool:
    record = store.record(run)
    return record is not None and record.status != "finished" and run in (records.living() or ())


def _events(data: bytes) -> str:
    lines = []
    for line in data.splitlines():
        try:
            lines.append(describe(msgspec.json.decode(line, type=dict[str, Any])) + "\n")
        except msgspec.DecodeError:
            continue  # cut off by a crash
    return "".join(lines)


def describe(event: dict[str, Any]) -> str:
    """Return one event as one line."""
    when = output.moment(float(event.get("time", 0)))
    if event.get("event") == "egress":
        what = _egress(event)
    else:
        fields = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("event", "time"))
        what = f"{event.get('event', '')} {fields}"
    return f"{when}  {output.clean(what)}"


def _egress(event: dict[str, Any]) -> str:
    verdict = "allowed" if event.get("verdict") == "allow" else "DENIED"
    request = " ".join(str(event[key]) for key in ("method", "path") if event.get(key))
    parts = [f"{verdict:<7} {event.get('protocol', '')} {event.get('host', '')}:{event.get('port', '')}", request]
    parts.append(str(event.get("reason", "")) if verdict == "DENIED" else "")
    parts.append(f"with {', '.join(event['credentials'])}" if event.get("credentials") else "")
    if event.get("bytes_up") or event.get("bytes_down"):
        up, down = output.size(int(event.get("bytes_up", 0))), output.size(int(event.get("bytes_down", 0)))
        parts.append(f"{up} up, {down} down")
    return "  ".join(part for part in parts if part)
