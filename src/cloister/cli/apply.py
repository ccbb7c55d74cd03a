"""`cloister apply`: copy reviewed changes of a run into the workspace."""

from __future__ import annotations

import os
import sys

from cloister.cli import records
from cloister.cli.arguments import Parser
from cloister.cli.output import clean, print_json
from cloister.runs import review


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "apply",
        "Copy changes of a run into the workspace.",
        prose=(
            "Each change is applied whole or refused with a reason. Links are never followed, set-user-id bits never "
            "carried over. Git hooks, editor and agent configuration and links that lead out are applied only with "
            "`--protected`; what you changed yourself since the run began only with `--force`. When everything was "
            "applied, the run's copy is removed."
        ),
        examples=(
            ("cloister apply last", "everything that may be applied"),
            ("cloister apply last src README.md", "only these"),
        ),
        exits=(("1", "something was refused; the rest is applied"),),
    )
    verb.add_argument("run", metavar="RUN", help="id of a run, the beginning of one, or `last`")
    verb.add_argument("paths", metavar="PATH", nargs="*", help="apply only these paths")
    verb.add_argument("--force", action="store_true", help="overwrite what changed in the workspace meanwhile")
    verb.add_argument("--protected", action="store_true", help="also what tools load by themselves")
    verb.add_argument("--keep", action="store_true", help="keep the run's copy when everything is applied")
    verb.json_option("path, result (applied or refused), why (a list)")
    return verb


def main(argv: list[str]) -> int:
    """Apply, and say what was refused."""
    options = parser().read(argv)
    store = records.store()
    run = store.find(options.run)
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
