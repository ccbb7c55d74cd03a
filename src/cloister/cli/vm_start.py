"""`cloister vm start`: start an agent's machine and leave it running: `cloister run --detach`, narrowed."""

from __future__ import annotations

import argparse
import os

from cloister.cli.arguments import Parser
from cloister.errors import UsageError
from cloister.runs import client


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the action."""
    start = actions.add_parser("start", help="start an agent's machine, leave it running, and print its id")
    start.add_argument("name", metavar="NAME", help="an agent of the policy; a command may follow, after `--`")
    start.add_argument("-C", "--directory", metavar="DIR", default=".", help="start in DIR")
    start.add_argument("--profile", metavar="NAME", default="", help="lay [profiles.NAME] over the agent")
    start.add_argument("--model", metavar="MODEL", default="", help="the one model it may use, of those allowed")
    start.add_argument("--mem", metavar="MIB", default="", help="memory of the guest, no more than the policy's")
    start.add_argument("--cpus", metavar="N", default="", help="processors of the guest, no more than the policy's")
    start.add_argument("--json", action="store_true", help="print JSON with the key run")


def main(options: argparse.Namespace) -> int:
    """Ask the broker and become the shim, which prints the id.

    Raises:
        CloisterError: nothing was asked for.
    """
    fields = {
        "agent": options.name,
        "replaced": "1" if options.command else "",
        "directory": os.path.normpath(os.path.join(here(), options.directory)),
        "profile": options.profile,
        "model": options.model,
        "memory": mebibytes(options.mem),
        "cpus": options.cpus,
        "json": "1" if options.json else "",
    }
    client.become_shim(client.request({**DETACHED, **fields}, options.command, (0, 1, 2)))
    return 125


DETACHED = {"verb": "run", "machine": "1", "detach": "1", "yes": "1"}
"""Of every start that leaves a machine running."""


def mebibytes(text: str) -> str:
    """Return a size as policies write it: a number alone counts MiB."""
    return f"{text}M" if text.isdigit() else text


def here() -> str:
    """Return the current directory.

    Raises:
        UsageError: it is gone.
    """
    try:
        return os.getcwd()
    except OSError as error:
        raise UsageError(
            "directory-unusable", f"cannot start there: {error.strerror}", where=".", remedy="cd to a project"
        ) from None
