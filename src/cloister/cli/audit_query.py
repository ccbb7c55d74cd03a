"""`cloister audit query`: events that fulfil conditions, from the index."""

from __future__ import annotations

import argparse
import sys
from itertools import islice

from cloister.cli import audit_options, output
from cloister.cli.arguments import Parser

DEFAULT_LIMIT = 200


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the action."""
    parser = audit_options.action(actions, "query", "print the events that fulfil conditions, oldest first")
    audit_options.add_conditions(parser)
    audit_options.add_log(parser)
    parser.add_argument(
        "--limit", metavar="N", type=int, default=DEFAULT_LIMIT, help=f"the newest N; 0 for all ({DEFAULT_LIMIT})"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--count", action="store_true", help="only how many there are")
    form.add_argument("--json", action="store_true", help="events as recorded, one JSON object per line")


def main(options: argparse.Namespace) -> int:
    """Print what was found.

    Raises:
        CloisterError: there is no log, it cannot be read, or an option is wrong.
    """
    question = audit_options.question_of(options)
    with audit_options.opened_log(options) as log:
        if options.count:
            print(sum(log.count(question, "kind").values()))
        elif options.limit <= 0:
            for event in log.find(question):
                audit_options.print_event(event, as_json=options.json)
        else:
            found = list(islice(log.find(question, newest_first=True), options.limit + 1))
            for event in reversed(found[: options.limit]):
                audit_options.print_event(event, as_json=options.json)
            if len(found) > options.limit and output.is_terminal():
                note = f"the newest {options.limit:,}; --limit 0 prints all, --count says how many"
                print(output.colour(note, "dim"), file=sys.stderr)
    return 0
