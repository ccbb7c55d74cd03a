"""`cloister diff`: what a run changed in overlay mode."""

from __future__ import annotations

import os
import sys

from cloister.cli import progress, records
from cloister.cli.arguments import Parser
from cloister.cli.output import clean, colour, print_json
from cloister.plan.changes import Change
from cloister.runs import review

SIGNS = {"added": "A", "modified": "M", "deleted": "D", "replaced": "R"}


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "diff",
        "Show what a run changed in overlay mode.",
        prose=(
            "The workspace is as it was; the changes wait until they are applied or discarded. A line marked `!` is "
            "applied only when asked for (`--protected`), one marked `C` conflicts with a later change of yours."
        ),
        examples=(
            ("cloister diff last", "all changes of the newest run"),
            ("cloister diff last --stat", "one line for each path"),
            ("cloister diff last src/", "only below src"),
        ),
        exits=(("1", "there are changes (with --exit-code)"),),
    )
    verb.add_argument("run", metavar="RUN", help="id of a run, the beginning of one, or `last`")
    verb.add_argument("paths", metavar="PATH", nargs="*", help="show only these paths")
    verb.add_argument("--stat", action="store_true", help="one line for each path, without contents")
    verb.add_argument("--exit-code", action="store_true", help="exit with 1 when there are changes")
    verb.json_option("path, op, kind, mode, size, link, conflict, asks, never (a list)")
    return verb


def main(argv: list[str]) -> int:
    """Print the changes."""
    options = parser().read(argv)
    store = records.store()
    run = store.find(options.run)
    review.bring(store, run, progress.shown(progress.READING, quiet=options.json))
    with review.reviewed(store, run) as (record, opened):
        changes = review.choose(opened.changes(), options.paths, record.workspace, os.getcwd())
        if options.json:
            print_json([as_data(change) for change in changes])
        elif options.stat:
            for change in changes:
                print(line(change))
        else:
            for change in changes:
                sys.stdout.write(opened.diff(change))
        if not changes and not options.json:
            print("the run changed nothing")
    return 1 if changes and options.exit_code else 0


def line(change: Change) -> str:
    """Return one line about a change."""
    mark = "!" if change.asks or change.never else "C" if change.conflict else " "
    why = f"  ({change.never or change.asks})" if mark == "!" else ""
    sign = SIGNS[change.op]
    tint = {"A": "green", "D": "red"}.get(sign, "yellow")
    return f"{colour(sign, tint)}{mark} {clean(change.path)}{'/' if change.kind == 'directory' else ''}{why}"


def as_data(change: Change) -> dict[str, object]:
    """Return a change as plain data; `before` is an implementation's affair."""
    names = ("path", "op", "kind", "mode", "size", "link", "conflict", "asks", "never")
    return {name: _text(getattr(change, name)) for name in names}


def _text(value: object) -> object:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
