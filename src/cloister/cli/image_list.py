"""`cloister image list` and `inspect`: which guest images there are, and what is in one."""

from __future__ import annotations

import argparse
import os
from typing import NamedTuple

import msgspec

from cloister.cli import image, output
from cloister.cli.arguments import Parser
from cloister.errors import CloisterError
from cloister.host.image_open import Trust
from cloister.runs.images import ImagePlaces, find_recipe, kept_packages, look, shipped_recipes, stores, trust_of


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the actions."""
    listing = actions.add_parser("list", help="list images")
    listing.add_argument("--recipes", action="store_true", help="list the recipes that come with Cloister instead")
    listing.add_argument(
        "--json",
        action="store_true",
        help="print JSON: a list with name, version, path, bytes, signer, comment, problem",
    )
    inspect = actions.add_parser("inspect", help="show the manifest and the packages of an image")
    inspect.add_argument("name", metavar="NAME", help="the image")
    inspect.add_argument("--version", type=int, default=None, metavar="N", help="which version; else the newest")
    inspect.add_argument(
        "--json",
        action="store_true",
        help="print JSON with the keys path, manifest, digest, signer, problem, packages, kept",
    )


def main(options: argparse.Namespace) -> int:
    """Show them.

    Raises:
        CloisterError: there is no such image, or the trust store cannot be believed.
    """
    if options.action == "list" and options.recipes:
        return _recipes(as_json=options.json)
    where = image.where()
    trusted = trust_of(where, image.policy(), os.getuid())
    return (
        _inspect(where, trusted, options)
        if options.action == "inspect"
        else _list(where, trusted, as_json=options.json)
    )


class _Row(NamedTuple):
    name: str
    version: int
    path: str
    bytes: int
    signer: str
    comment: str
    """Whose key that is, in the words of the trust store."""
    problem: str


def _row(row: _Row) -> list[str]:
    signer = f"{row.signer[:16]} {row.comment}".rstrip() or "unsigned"
    return [row.name, str(row.version), output.size(row.bytes), f"refused: {row.problem}" if row.problem else signer]


def _list(where: ImagePlaces, trusted: Trust, *, as_json: bool) -> int:
    rows = [
        _Row(one.name, one.version, one.path, one.bytes, *_signer(where, trusted, one.name, one.version))
        for store in stores(where)
        for one in store.stored()
    ]
    if as_json:
        output.print_json([row._asdict() for row in rows])
    elif rows:
        print(output.table(["IMAGE", "VERSION", "SIZE", "SIGNED BY"], [_row(row) for row in rows]))
    else:
        print("no guest images; `cloister image build dev` makes one")
    return 0


def _signer(where: ImagePlaces, trusted: Trust, name: str, version: int) -> tuple[str, str, str]:
    """Return the public key that counts, its comment, and why the image is refused."""
    try:
        found = look(where, trusted, name, version)
    except CloisterError as error:
        return "", "", error.reference
    return (found.signer.public, found.signer.comment, "") if found.signer else ("", "", "")


def _inspect(where: ImagePlaces, trusted: Trust, options: argparse.Namespace) -> int:
    found = look(where, Trust(trusted.keys, required=False), options.name, options.version)
    *_, problem = _signer(where, trusted, options.name, found.manifest.version)
    manifest = found.manifest
    kept, every = kept_packages(where).count(found.lock)
    if options.json:
        output.print_json({
            "path": found.path, "manifest": msgspec.to_builtins(manifest), "digest": manifest.digest(),
            "signer": found.signer.public if found.signer else "", "problem": problem,
            "packages": msgspec.to_builtins(found.lock.packages), "kept": kept,
        })  # fmt: skip
        return 0
    print(output.pairs([
        ("image", f"{manifest.name} {manifest.version}"), ("in", found.path), ("digest", manifest.digest()),
        ("signed by", found.signer.public if found.signer else "nobody who is trusted"), ("refused", problem),
        ("kernel", f"{manifest.kernel_release}, {output.size(manifest.kernel.size)}"),
        ("initramfs", output.size(manifest.initramfs.size)),
        ("root", f"{output.size(manifest.root.size)}, {manifest.root.root_hash}"),
        ("command line", manifest.cmdline), ("suite", found.lock.suite),
    ]))  # fmt: skip
    print(f"\n{len(found.lock.packages)} packages; of Debian's {every}, {kept} are kept for --locked")
    print(
        output.table(
            ["KIND", "PACKAGE", "VERSION"], [[each.kind, each.name, each.version] for each in found.lock.packages]
        )
    )
    return 0


def _recipes(*, as_json: bool) -> int:
    rows = [[name, find_recipe(name).recipe.description] for name in shipped_recipes()]
    if as_json:
        output.print_json([{"name": name, "description": what} for name, what in rows])
    else:
        print(output.table(["RECIPE", "WHAT IT HAS"], rows))
    return 0
