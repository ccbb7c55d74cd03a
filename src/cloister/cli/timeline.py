"""`cloister timeline`: what happened in a run, in order, as text or as one HTML page."""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import sys
from collections.abc import Iterable

from cloister.audit import timeline_text
from cloister.audit.describe import LANES
from cloister.audit.event import Event
from cloister.audit.question import Question
from cloister.audit.timeline import Timeline, build
from cloister.cli import audit_options, output, records
from cloister.cli.arguments import Parser
from cloister.errors import CloisterError, StepError, UsageError
from cloister.runs.store import is_id
from cloister.runs.timeline_records import events_of

_SHADES = {"denied": "red", "alarm": "red", "warning": "yellow", "": ""}


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "timeline",
        "Show what happened in a run, in order: processes, files, connections, model calls, credentials.",
        prose=(
            "Read from the log of the audit that has the run; where none has it, from the run's own records, which "
            "know nothing of processes and files. What a process does with many files within a second is one line; "
            "--html has all of them. The page needs nothing but itself: it loads nothing and runs no script, so it "
            "can be mailed, or kept with a ticket."
        ),
        examples=(
            ("cloister timeline last", "the newest run"),
            ("cloister timeline last --html run.html", "the same as a page"),
            ("cloister timeline last --only network,model", "what it talked to"),
            ("sudo cloister timeline RUN --processes", "who started what"),
        ),
    )
    verb.run_argument()
    verb.add_argument("--html", metavar="FILE", default="", help="write a page there; - for standard output")
    verb.add_argument(
        "--only", metavar="LANES", type=_lanes, default=LANES, help=f"only these, joined by commas: {', '.join(LANES)}"
    )
    verb.add_argument("--processes", action="store_true", help="show the tree of processes instead")
    audit_options.add_log(verb)
    verb.add_argument("--records", action="store_true", help="read the run's own records, whatever a log has")
    verb.json_option("run, agent, user, command, workspace, policy, plan, reason, exit_code, first, last, sums, "
                     "entries (time, lane, kind, text, tone, last, folded), processes, source")  # fmt: skip
    return verb


def main(argv: list[str]) -> int:
    """Show it.

    Raises:
        UsageError: nothing knows this run.
        StepError: the page cannot be written.
    """
    options = parser().read(argv)
    run = _run(options.run)
    events, source = _events(options, run)
    if not events:
        raise UsageError("run-unknown", f"no log and no record has the run {run!r}", remedy="cloister ps --all")
    made = build(events[0].run, events)
    made.entries = [entry for entry in made.entries if entry.lane in options.only]
    if options.html:
        _write(made, source, options.html)
    elif options.json:
        import msgspec

        output.print_json({**msgspec.to_builtins(made), "source": source})
    elif options.processes:
        for line in timeline_text.tree(made):
            print(output.clean(line))
    else:
        _show(made, source)
    return 0


def _show(made: Timeline, source: str) -> None:
    print(output.pairs([*timeline_text.facts(made), ("source", source)]))
    print()
    for entry in made.entries:
        when = output.colour(f"{timeline_text.offset(made, entry.time):>12}", "dim")
        words = output.clean(entry.text)
        shade = _SHADES[entry.tone]
        print(f"{when}  {entry.kind:<20} {output.colour(words, shade) if shade else words}")


def _write(made: Timeline, source: str, target: str) -> None:
    from cloister.audit.timeline_html import page

    if target == "-":
        sys.stdout.writelines(page(made, source))
        return
    try:
        with open(target, "w", encoding="utf-8", opener=_private) as file:
            file.writelines(page(made, source))
    except OSError as error:
        raise StepError("page-unwritable", f"cannot be written: {error.strerror}", where=target) from error
    print(f"{target}: {len(made.entries):,} entries of {made.sums.events:,} events")


def _private(path: str, flags: int) -> int:
    """Open a file that only its owner may read: it tells what an agent did."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _events(options: argparse.Namespace, run: str) -> tuple[list[Event], str]:
    """Return the events of a run, and where they are from."""
    wanted = Question(runs=(run if is_id(run) else f"{run}*",))
    if not options.records:
        logs: Iterable[argparse.Namespace] = (
            (options,) if options.system or options.own or options.log else _both(options)
        )
        for asked in logs:
            with contextlib.suppress(CloisterError) if asked is not options else contextlib.nullcontext():
                with audit_options.opened_log(asked) as log:
                    events: list[Event] = list(log.find(wanted))
                if len({event.run for event in events}) > 1:
                    raise UsageError("run-unknown", f"several runs begin with {run!r}", remedy="more letters")
                if events:
                    return events, f"the audit log {log.directory}"
    if options.system or options.log or not is_id(run):
        return [], ""
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(os.getuid()).pw_name
        return list(events_of(records.store(), run, user)), "the run's own records"
    return list(events_of(records.store(), run, "")), "the run's own records"


def _both(options: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the options for the system's log and for the user's own."""
    return [
        argparse.Namespace(**{**vars(options), "system": True}),
        argparse.Namespace(**{**vars(options), "own": True}),
    ]


def _run(word: str) -> str:
    """Return the id of a run of this user's; a word that none of them has is left as it is, for the logs."""
    try:
        return records.store().find(word)
    except UsageError:
        if word == "last" or not word.isalnum():
            raise
        return word


def _lanes(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if unknown := [name for name in found if name not in LANES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(LANES)}")
    return found
