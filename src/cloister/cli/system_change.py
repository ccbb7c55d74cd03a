"""What the verbs that change the system share: showing the plan, asking, doing. No verb itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from cloister.cli.arguments import Parser
from cloister.cli.output import print_json
from cloister.errors import StepError
from cloister.plan.system_render import as_text
from cloister.runs.system_setup import Prepared, carry_out

REFUSED = 1
"""The person at the terminal said no."""


def add_options(verb: Parser) -> None:
    """Add the options that all of them have."""
    verb.add_argument("--yes", "-y", action="store_true", help="do not ask")
    verb.add_argument("--dry-run", action="store_true", help="only show what would be done")
    verb.json_option("steps, notices, done")


def show_and_do(prepare: Callable[[], Prepared], options: argparse.Namespace, question: str) -> int:
    """Show what `prepare` returns, ask, and do it; return the exit code.

    Without a terminal and without `--yes`, nobody can answer, and the answer is no.

    Raises:
        StepError: a step failed, and everything was undone; or the system changed while somebody read the question.
    """
    yes, dry_run, json = options.yes, options.dry_run, options.json
    prepared = prepare()
    plan = prepared.plan
    pending = bool(plan.steps) or prepared.after != prepared.record
    if not json:
        sys.stdout.write(as_text(plan))
        sys.stdout.flush()
    agreed = pending and not dry_run and (yes or (not json and _ask(question)))
    if agreed and not yes and prepare().plan != plan:
        message = "the system or its policy changed while you read this: nothing was done"
        raise StepError("plan-outdated", message, remedy="run it again")
    if agreed:
        carry_out(prepared)
    if json:
        print_json({"steps": plan.steps, "notices": plan.notices, "done": agreed})
    elif agreed and plan.steps:
        print("done")
    return 0 if agreed or dry_run or not pending else REFUSED


def _ask(question: str) -> bool:
    if not sys.stdin.isatty():
        sys.stderr.write("nobody can be asked here: nothing was done (--yes does it without asking)\n")
        return False
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
