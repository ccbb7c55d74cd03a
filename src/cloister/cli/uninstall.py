"""`cloister uninstall`: take out of this system what `cloister setup` and `apply` put there."""

from __future__ import annotations

import os

from cloister.cli import system_change
from cloister.cli.arguments import Parser
from cloister.runs import system_setup


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "uninstall",
        "Remove the daemons, accounts and files of the system's installation.",
        prose=(
            "Ends every run and service under systemd, then removes what was made. The policy, keys, records and the "
            "files of agents stay, and so do the accounts that own them; --purge deletes them. The program itself "
            "and runs in namespaces are not touched."
        ),
        examples=(("sudo cloister uninstall", "show it, ask, remove"),),
        exits=(("1", "you said no"),),
    )
    system_change.add_options(verb)
    verb.add_argument("--purge", action="store_true", help="also delete data, policy, keys and all accounts")
    return verb


def main(argv: list[str]) -> int:
    """Remove."""
    options = parser().read(argv)
    system_setup.require_root("uninstall", os.geteuid())
    question = "Remove this, and DELETE all data?" if options.purge else "Remove this?"
    return system_change.show_and_do(lambda: system_setup.prepare_uninstall(purge=options.purge), options, question)
