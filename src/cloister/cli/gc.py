"""`cloister gc`: remove what nobody needs any more. What that is, is decided in `runs/collect.py`."""

from __future__ import annotations

import os
import time

from cloister.cli import output, records
from cloister.cli.arguments import Parser, duration
from cloister.errors import PolicyError, StepError
from cloister.host import etc
from cloister.host.owner import identify
from cloister.policy.load import load_document
from cloister.policy.model import Audit
from cloister.policy.units import parse_duration
from cloister.runs.collect import Leftover, Rules, remove, survey
from cloister.runs.paths import Paths
from cloister.runs.policies import PolicyFiles


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "gc",
        "Remove old records, history of vanished projects, and leftovers.",
        prose=(
            "Finished runs are kept for `audit.retention` of the policy (90 days). An agent's history goes when its "
            "project is gone and it was not used for as long. Copies of /etc that no run uses, and what killed brokers "
            "left, go at once. Changes of overlay runs that were neither applied nor discarded stay, unless --overlays "
            "is given."
        ),
        examples=(("cloister gc --dry-run", "only look"), ("cloister gc --older-than 7d", "keep one week")),
    )
    verb.add_argument("--older-than", type=duration, metavar="TIME", help="keep what is younger than this (30d)")
    verb.add_argument("-n", "--dry-run", action="store_true", help="print what would be removed")
    verb.add_argument(
        "--overlays", action="store_true", help="also changes nobody has applied or discarded: they are lost"
    )
    verb.json_option("removed (kind, path, bytes, why), bytes, dry_run")
    return verb


def main(argv: list[str]) -> int:
    """Survey, then remove unless it is a dry run.

    Raises:
        PolicyError: the policy is wrong, so its retention is not known.
        StepError: something could not be removed.
    """
    options = parser().read(argv)
    places = records.places()
    older_than_s = _retention(places) if options.older_than is None else options.older_than
    rules = Rules(
        now=time.time(),
        older_than_s=older_than_s,
        living=_living(dry_run=options.dry_run),
        etc_in_use=etc.locate(places.etc, identify(places.home)._replace(home=places.home), hostname="cloister"),
        overlays=options.overlays,
    )
    found = survey(places, rules)
    stuck = [] if options.dry_run else [one for one in found if not remove(one)]
    gone = [one for one in found if one not in stuck]
    total = sum(one.bytes for one in gone)
    if options.json:
        output.print_json({"removed": gone, "bytes": total, "dry_run": options.dry_run})
    else:
        _print(gone, total, dry_run=options.dry_run)
    if stuck:
        raise StepError("not-removed", f"{len(stuck)} could not be removed", where=stuck[0].path)
    return 0


def _print(gone: list[Leftover], total: int, *, dry_run: bool) -> None:
    if gone:
        rows = [[one.kind, output.size(one.bytes), one.path, one.why] for one in gone]
        print(output.table(["KIND", "SIZE", "PATH", "WHY"], rows))
    verb = "would remove" if dry_run else "removed"
    print(f"{verb} {len(gone)} thing{'' if len(gone) == 1 else 's'}, {output.size(total)}")


def _living(*, dry_run: bool) -> frozenset[str]:
    """Return living runs. When a broker was killed, a new one is started first: it undoes what that one's runs left."""
    living = records.living()
    store = records.store()
    unfinished = any((record := store.record(run)) is None or record.status != "finished" for run in store.ids())
    if living is None and unfinished and not dry_run:
        records.control({"verb": "living"})
        living = records.living()
    return living or frozenset()


def _retention(places: Paths) -> float:
    """Return how long the policy wants records to be kept; the default where there is no policy."""
    files = PolicyFiles(places, os.getuid())
    try:
        document = files.document()
    except PolicyError as error:
        if error.reference == "policy-missing":
            return float(parse_duration(Audit().retention))
        raise
    return float(parse_duration(load_document(document, preset_names=tuple(files.presets())).audit.retention))
