"""`cloister image gc` and `allow-older`: remove versions nobody needs; go back to an older one by hand."""

from __future__ import annotations

import argparse

from cloister.cli import image, output, records
from cloister.cli.arguments import Parser
from cloister.errors import UsageError
from cloister.runs.images import collect_images


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the actions."""
    gc = actions.add_parser("gc", help="remove old versions, what killed builds left, and packages that no image needs")
    gc.add_argument("--keep", type=int, default=2, metavar="N", help="newest versions of each image to keep (2)")
    gc.add_argument("-n", "--dry-run", action="store_true", help="print what would be removed")
    gc.add_argument("--json", action="store_true", help="print JSON with the keys removed (paths), dry_run")
    older = actions.add_parser("allow-older", help="let runs use an older version of an image again")
    older.add_argument("name", metavar="NAME", help="the image")
    older.add_argument("version", type=int, metavar="VERSION", help="the oldest version that runs may use")
    older.add_argument("--json", action="store_true", help="print JSON with the keys name, version, was")


def main(options: argparse.Namespace) -> int:
    """Remove, or allow.

    Raises:
        CloisterError: something cannot be removed; there is no such version, or it is not trusted.
    """
    where = image.where()
    if options.action == "allow-older":
        answer = records.control({"verb": "image-allow-older", "name": options.name, "version": str(options.version)})
        if options.json:
            output.print_json(answer)
        else:
            print(f"runs may use {options.name} from version {options.version} on (until now {answer['was']})")
        return 0
    if options.keep < 1:
        raise UsageError("image-keep", "the newest version of an image is always kept", remedy="--keep 1")
    gone = collect_images(where, records.store(), records.living(), keep=options.keep, dry_run=options.dry_run)
    if options.json:
        output.print_json({"removed": gone, "dry_run": options.dry_run})
    else:
        for path in gone:
            print(path)
        print(f"{'would remove' if options.dry_run else 'removed'} {len(gone)}")
    return 0
