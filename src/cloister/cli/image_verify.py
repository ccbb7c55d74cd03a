"""`cloister image verify`: is an image what its signer signed? Every byte of it is looked at."""

from __future__ import annotations

import argparse
import os
import time

from cloister.cli import image, output
from cloister.cli.arguments import Parser
from cloister.host.image_open import open_image
from cloister.host.image_store import SeenVersions
from cloister.host.image_verify import verify_root
from cloister.runs.images import store_of, trust_of


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the action."""
    verb = actions.add_parser("verify", help="find out whether an image was changed; exit 77 when it was")
    verb.add_argument("name", metavar="NAME", help="the image")
    verb.add_argument("--version", type=int, default=None, metavar="N", help="which version; else the newest")
    verb.add_argument(
        "--json", action="store_true", help="print JSON with the keys name, version, digest, signer, source, seconds"
    )


def main(options: argparse.Namespace) -> int:
    """Verify signature, version, kernel, initramfs and the whole root.

    Raises:
        CloisterError: what is wrong.
    """
    begin = time.monotonic()
    where = image.where()
    trusted = trust_of(where, image.policy(), os.getuid())
    store = store_of(where, options.name)
    with open_image(store, options.name, trusted, version=options.version) as opened:
        verify_root(opened)
        manifest, signer = opened.manifest, opened.signer
    highest = SeenVersions(where.seen).highest(manifest.name, signer.public if signer else "")
    seconds = time.monotonic() - begin
    if options.json:
        output.print_json({
            "name": manifest.name, "version": manifest.version, "digest": manifest.digest(),
            "seconds": round(seconds, 2), "signer": signer.public if signer else "",
            "source": signer.source if signer else "",
        })  # fmt: skip
        return 0
    print(f"{manifest.name} {manifest.version} is what was signed ({output.span(seconds)})")
    print(output.pairs([
        ("signed by", f"{signer.public[:16]} {signer.comment}".rstrip() if signer else "nobody who is trusted"),
        ("trusted by", signer.source if signer else ""), ("digest", manifest.digest()),
        ("older", f"than {highest}, which was used here: a run refuses it" if manifest.version < highest else ""),
    ]))  # fmt: skip
    return 0
