"""`cloister image`: guest images and the keys that sign them. Actions are in modules of their own, as `image_make`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

from cloister.cli import records
from cloister.cli.arguments import Parser
from cloister.errors import PolicyError, StepError, UsageError
from cloister.policy.model import Images
from cloister.runs.images import ImagePlaces, places
from cloister.runs.policies import PolicyFiles

ACTIONS = {
    "build": "make", "renew": "make", "list": "list", "inspect": "list", "verify": "verify", "keygen": "sign",
    "sign": "sign", "gc": "gc", "allow-older": "gc",
}  # fmt: skip
"""Each belongs to a module `cloister.cli.image_WORD` with `describe(parsers)` and `main(options)`."""


class Action(Parser):
    """The parser of one action: argparse names it by its `prog`."""

    def __init__(self, **settings: str) -> None:
        """Take what `add_parser` knows."""
        super().__init__(settings["prog"].removeprefix("cloister "), "")


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "image",
        "Build, sign, verify and list the guest images of microVMs.",
        prose=(
            "An image is built from a recipe (cloister-image(1); `cloister image list --recipes` shows those that come "
            "with Cloister) out of Debian packages, as an ordinary user, the same bytes for the same packages. It is "
            "signed with your key (~/.config/cloister/image-key, made by the first build), which counts for you; other "
            "keys are trusted by a .pub file in ~/.config/cloister/trust.d or /etc/cloister/trust.d, or by "
            "`images.trust` of the policy. A run verifies the signature and the bytes that it boots, every time."
        ),
        examples=(
            ("cloister image build dev", "from a shipped recipe"),
            ("cloister image build ./mine.toml", "from one of yours"),
            ("cloister image verify dev", "look at every byte"),
            ("cloister image renew dev", "the same packages with the program of this Cloister"),
            ("cloister image gc --keep 1", "remove all but the newest"),
        ),
    )
    actions = verb.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Action)
    for word in dict.fromkeys(ACTIONS.values()):
        _module(word).describe(actions)
    return verb


def main(argv: list[str]) -> int:
    """Do one action.

    Raises:
        CloisterError: as the action; `image-files` when a file cannot be read or written.
    """
    options: argparse.Namespace = parser().read(argv)
    try:
        code: int = _module(ACTIONS[options.action]).main(options)
    except OSError as error:
        message = f"the store or the keys of images cannot be used: {error.strerror}"
        raise StepError("image-files", message, where=str(error.filename or "")) from error
    return code


def where() -> ImagePlaces:
    """Return this user's places of images."""
    return places(os.environ, records.places(), policy())


def policy() -> Images:
    """Return the table `images` of the policy; the defaults where there is no policy.

    Raises:
        PolicyError: the policy is wrong, so that nobody knows what it trusts.
    """
    files = PolicyFiles(records.places(), os.getuid())
    try:
        return files.images()
    except PolicyError as error:
        if error.reference == "policy-missing":
            return Images()
        raise


def ask_passphrase() -> bytes:
    """Ask for the passphrase of a key.

    Raises:
        UsageError: nobody is there.
    """
    import getpass

    if not sys.stdin.isatty():
        raise UsageError("image-key", "the key has a passphrase, and this is no terminal to ask on")
    return getpass.getpass("passphrase of the image key: ").encode()


def _module(word: str) -> Any:
    return importlib.import_module(f"cloister.cli.image_{word}")
