"""`cloister apply`: make the system as its policy says; with a run, copy its reviewed changes into the workspace."""

from __future__ import annotations

import argparse
import os
import sys

from cloister.cli import progress, records, system_change
from cloister.cli.arguments import Parser
from cloister.cli.output import clean, print_json
from cloister.errors import UsageError
from cloister.runs import review, system_setup


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "apply",
        "Make the system as its policy says, or copy changes of a run into the workspace.",
        prose=(
            "Without RUN, root makes accounts, grants, units and files as /etc/cloister/cloister.toml says: shown as "
            "differences first, also where something was changed by hand, and asked; a step that fails has all "
            "others undone; a second time nothing is left to do. What is not granted any more is stopped. "
            "With RUN, changes are copied: each change is applied whole or refused with a reason. Links are never "
            "followed, set-user-id bits never carried over. Git hooks, editor and agent configuration and links that "
            "lead out are applied only with `--protected`; what you changed yourself since the run began only with "
            "`--force`. When everything was applied, the run's copy is removed."
        ),
        examples=(
            ("sudo cloister apply", "after a change of the system's policy"),
            ("cloister apply last", "everything that may be applied"),
            ("cloister apply last src README.md", "only these"),
        ),
        exits=(("1", "something was refused, the rest is applied; or you said no"),),
    )
    verb.add_argument("run", metavar="RUN", nargs="?", default="", help="id of a run, the beginning of one, or `last`")
    verb.add_argument("paths", metavar="PATH", nargs="*", help="apply only these paths")
    verb.add_argument("--force", action="store_true", help="overwrite what changed in the workspace meanwhile")
    verb.add_argument("--protected", action="store_true", help="also what tools load by themselves")
    verb.add_argument("--keep", action="store_true", help="keep the run's copy when everything is applied")
    verb.add_argument("--yes", "-y", action="store_true", help="without RUN: do not ask")
    verb.add_argument("--dry-run", action="store_true", help="without RUN: only show what would be done")
    verb.json_option("path, result (applied or refused), why (a list); without RUN steps, notices, done")
    return verb


def main(argv: list[str]) -> int:
    """Apply, and say what was refused."""
    options = parser().read(argv)
    if not options.run:
        return _to_system(options)
    if options.yes or options.dry_run:
        raise UsageError(
            "usage", "--yes and --dry-run are for the system's policy", remedy="cloister diff RUN shows it"
        )
    store = records.store()
    run = store.find(options.run)
    review.bring(store, run, progress.shown(progress.READING, quiet=options.json))
    with review.reviewed(store, run) as (record, opened):
        changes = review.choose(opened.changes(), options.paths, record.workspace, os.getcwd())
        outcomes = review.apply(opened, changes, force=options.force, protected=options.protected)
        refused = [outcome for outcome in outcomes if outcome.result == "refused"]
        done = not refused and not options.keep and not options.paths
    if done:
        review.discard(store, run)
    if options.json:
        print_json([{"path": one.path, "result": one.result, "why": one.why} for one in outcomes])
        return 1 if refused else 0
    for one in refused:
        sys.stderr.write(f"refused {clean(one.path)}: {one.why}\n")
    print(f"{len(outcomes) - len(refused)} of {len(outcomes)} changes applied to {clean(record.workspace)}")
    return 1 if refused else 0


def _to_system(options: argparse.Namespace) -> int:
    system_setup.require_root("apply", os.geteuid())
    if options.force or options.protected or options.keep:
        raise UsageError(
            "usage", "--force, --protected and --keep are for changes of a run", remedy="cloister apply RUN"
        )
    return system_change.show_and_do(system_setup.prepare_apply, options, "Apply this?")
