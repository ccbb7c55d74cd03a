"""`cloister audit tail`: the newest events of the log, and those that come."""

from __future__ import annotations

import argparse
import time

from cloister.cli import audit_options
from cloister.cli.arguments import Parser
from cloister.errors import RetryError
from cloister.runs.audit_log import Follower

POLL_S = 0.2


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the action."""
    parser = audit_options.action(actions, "tail", "print the newest events; with -f, go on with those that come")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    parser.add_argument("-n", "--lines", metavar="N", type=int, default=20, help="how many to begin with (20)")
    audit_options.add_conditions(parser)
    audit_options.add_log(parser)
    parser.add_argument("--json", action="store_true", help="events as recorded, one JSON object per line")


def main(options: argparse.Namespace) -> int:
    """Print, and follow when asked to.

    Raises:
        CloisterError: there is no log, or it cannot be read.
    """
    question = audit_options.question_of(options)
    with audit_options.opened_log(options, indexed=False) as log:
        follower = Follower(log.directory)
        for event in log.newest(question, options.lines) if options.lines > 0 else ():
            audit_options.print_event(event, as_json=options.json, flush=options.follow)
        test = question.test()
        while options.follow:
            try:
                for event in follower.added():
                    if test(event):
                        audit_options.print_event(event, as_json=options.json, flush=True)
            except FileNotFoundError:
                raise RetryError("audit-gone", "the log was removed", where=log.directory) from None
            time.sleep(POLL_S)
    return 0
