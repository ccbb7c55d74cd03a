"""`cloister image keygen` and `sign`: the key that signs guest images, and its signatures."""

from __future__ import annotations

import argparse
import getpass
import os
import sys

from cloister.cli import image, output
from cloister.cli.arguments import Parser
from cloister.errors import UsageError
from cloister.host import image_keys
from cloister.runs.images import sign_image


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the actions."""
    keygen = actions.add_parser("keygen", help="make a key; print the line by which others trust it")
    keygen.add_argument(
        "--key", default="", metavar="FILE", help="where to put it; else your own, in ~/.config/cloister"
    )
    keygen.add_argument("--passphrase", action="store_true", help="ask for a passphrase; every use asks for it again")
    keygen.add_argument("--comment", default="", metavar="TEXT", help="whose it is, for readers of trust stores")
    keygen.add_argument("--json", action="store_true", help="print JSON with the keys key, public, line")
    sign = actions.add_parser("sign", help="sign an image; signatures of other keys stay beside it")
    sign.add_argument("name", metavar="NAME", help="the image")
    sign.add_argument("--version", type=int, default=None, metavar="N", help="which version; else the newest")
    sign.add_argument("--key", default="", metavar="FILE", help="the key; else your own")
    sign.add_argument("--json", action="store_true", help="print JSON with the keys name, version, digest, signer")


def main(options: argparse.Namespace) -> int:
    """Make a key, or sign with one.

    Raises:
        CloisterError: there is a key already, or none, or the image is damaged.
    """
    where = image.where()
    path = os.path.abspath(options.key) if options.key else where.key
    if options.action == "sign":
        manifest, public = sign_image(where, options.name, options.version, image_keys.load(path, image.ask_passphrase))
        if options.json:
            output.print_json(
                {"name": manifest.name, "version": manifest.version, "digest": manifest.digest(), "signer": public}
            )
        else:
            print(f"{manifest.name} {manifest.version} is signed by {public[:16]}")
        return 0
    comment = " ".join(options.comment.split())
    line = image_keys.generate(path, passphrase=_new_passphrase() if options.passphrase else b"", comment=comment)
    if options.json:
        output.print_json({"key": path, "public": f"{path}.pub", "line": line.strip()})
    else:
        print(line, end="")
        print(
            f"the key is {path}; who shall trust it puts the line into a .pub file in /etc/cloister/trust.d",
            file=sys.stderr,
        )
    return 0


def _new_passphrase() -> bytes:
    if not sys.stdin.isatty():
        raise UsageError("image-key", "a passphrase is asked for on a terminal, and this is none")
    first = getpass.getpass("new passphrase: ")
    if not first or first != getpass.getpass("again: "):
        raise UsageError("image-key", "the passphrases differ, or there is none")
    return first.encode()
