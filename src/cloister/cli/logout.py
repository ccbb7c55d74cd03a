"""`cloister logout`: revoke a login where its provider can, and forget its tokens."""

from __future__ import annotations

import os
import sys

import msgspec

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.host.logins import Shelf, unknown
from cloister.runs.login_flow import log_out
from cloister.runs.login_renewal import poster


class LoggedOut(msgspec.Struct, frozen=True):
    """What happened, as `--json` prints it."""

    name: str
    outcome: str
    """`revoked`, or `forgotten` where the provider was not told or did not confirm."""


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "logout",
        "End logins: revoke them where the provider can, and forget their tokens.",
        prose="Runs that use one fail at their next request. The file is removed, whatever the provider says.",
        examples=(("cloister logout claude", "forget the login of Claude Code"),),
    )
    verb.add_argument("name", metavar="NAME", nargs="+", help="names of logins")
    verb.add_argument("--local", action="store_true", help="only forget it here")
    verb.json_option("name, outcome (a list)")
    return verb


def main(argv: list[str]) -> int:
    """Log out.

    Raises:
        UsageError: there is no such login.
    """
    options = parser().read(argv)
    shelf = Shelf(records.places().logins)
    for name in options.name:
        if shelf.stamp(name) is None:
            raise unknown(name)
    send = None if options.local else poster(os.environ)
    done = [LoggedOut(name, log_out(shelf, name, send)) for name in options.name]
    if options.json:
        output.print_json(done)
        return 0
    for one in done:
        print(f"{one.name}: {one.outcome}")
        if one.outcome == "forgotten" and not options.local:
            sys.stderr.write(
                "the provider has not confirmed that it ends: to be sure, end the session on its web page as well\n"
            )
    return 0
