"""`cloister setup`: make Cloister a part of this system, so that agents run as system users of their own."""

from __future__ import annotations

import os

from cloister.cli import system_change
from cloister.cli.arguments import Parser
from cloister.runs import system_setup


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "setup",
        "Install the daemons, accounts and files that agents as system users need.",
        prose=(
            "For the owner of a machine with several people or with gateways; agents in namespaces need none of it. "
            "Shows everything as differences first, and asks. Writes a first /etc/cloister/cloister.toml where there "
            "is none. A step that fails has all others undone. `cloister uninstall` takes everything back."
        ),
        examples=(("sudo cloister setup", "show it, ask, install"), ("sudo cloister setup --dry-run", "only show it")),
        exits=(("1", "you said no"),),
    )
    system_change.add_options(verb)
    return verb


def main(argv: list[str]) -> int:
    """Install."""
    options = parser().read(argv)
    system_setup.require_root("setup", os.geteuid())
    return system_change.show_and_do(system_setup.prepare_setup, options, "Install this?")
