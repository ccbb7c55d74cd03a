"""`cloister image build` and `renew`: make a version of a guest image."""

from __future__ import annotations

import argparse
import os
import sys
import time

from cloister.cli import image, output
from cloister.cli.arguments import Parser
from cloister.errors import UsageError
from cloister.images import lock
from cloister.runs.images import Builder, Built, find_recipe, store_of

_JSON = "print JSON with the keys name, version, path, digest, signer, root_hash, seconds"


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the actions."""
    build = actions.add_parser("build", help="build an image from a recipe")
    build.add_argument("recipe", metavar="RECIPE", help="the name of a shipped recipe, or a file (with a / or .toml)")
    build.add_argument("--version", type=int, default=None, metavar="N", help="its version; else the next one")
    build.add_argument(
        "--locked", default="", metavar="FILE", help="build from the packages of this lock.json, and refuse others"
    )
    build.add_argument("--unsigned", action="store_true", help="do not sign it")
    build.add_argument("--json", action="store_true", help=_JSON)
    renew = actions.add_parser("renew", help="put this Cloister's own program into an image; its packages stay")
    renew.add_argument("name", metavar="NAME", help="the image")
    renew.add_argument("--version", type=int, default=None, metavar="N", help="its version; else the next one")
    renew.add_argument("--json", action="store_true", help=_JSON)


def main(options: argparse.Namespace) -> int:
    """Build, and say what came out.

    Raises:
        CloisterError: a mistake in the recipe, a package that is not there, a missing tool.
    """
    begin = time.monotonic()
    if options.version is not None and options.version < 1:
        raise UsageError("image-version", "versions count from 1")
    told = _Progress(quiet=options.json)
    if options.action == "renew":
        store_of(image.where(), options.name).path(options.name)  # there is one: only then a key is made
        builder = Builder(image.where(), told.say, ask=image.ask_passphrase)
        built = builder.renew(options.name, image.policy(), os.getuid(), version=options.version)
    else:
        found = find_recipe(options.recipe)
        locked = _lock(options.locked) if options.locked else None
        builder = Builder(image.where(), told.say, ask=image.ask_passphrase, sign=not options.unsigned)
        built = builder.build(found, version=options.version, locked=locked)
    told.end()
    _tell(built, time.monotonic() - begin, as_json=options.json)
    return 0


class _Progress:
    """One line that changes on a terminal, a line each where there is none."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._begin = quiet, time.monotonic()
        self._live = sys.stderr.isatty()

    def say(self, what: str) -> None:
        """Tell what is being done."""
        if self._quiet:
            return
        line = f"{time.monotonic() - self._begin:5.1f} s  {output.clean(what)}"
        sys.stderr.write(f"\r\x1b[K{output.cut(line, 78)}" if self._live else f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Clear the line."""
        if self._live and not self._quiet:
            sys.stderr.write("\r\x1b[K")


def _lock(path: str) -> lock.Lock:
    try:
        with open(path, "rb") as file:
            return lock.decode(file.read(8 << 20))
    except (OSError, ValueError) as error:
        raise UsageError("image-lock", f"the lock cannot be read: {error}", where=path) from error


def _tell(built: Built, seconds: float, *, as_json: bool) -> None:
    manifest = built.manifest
    if as_json:
        output.print_json({
            "name": manifest.name, "version": manifest.version, "path": built.path, "digest": manifest.digest(),
            "signer": built.signer, "root_hash": manifest.root.root_hash, "seconds": round(seconds, 1),
        })  # fmt: skip
        return
    print(f"{manifest.name} {manifest.version} in {output.span(seconds)}")
    print(output.pairs([
        ("kernel", manifest.kernel_release),
        ("root", f"{output.size(manifest.root.size)}, {manifest.root.root_hash}"),
        ("signed by", built.signer[:16] or "nobody"), ("in", built.path),
    ]))  # fmt: skip
