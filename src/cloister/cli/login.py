"""`cloister login`: log in to a provider outside every sandbox, for runs that never see the tokens."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.credentials.logins import Description, describe
from cloister.errors import CloisterError, UsageError
from cloister.host.browser import open_browser
from cloister.host.logins import Shelf
from cloister.policy.values import check_name
from cloister.runs.login_files import load
from cloister.runs.login_flow import Person, by_browser, by_device, by_paste, from_product, keep, provider_for
from cloister.runs.login_renewal import poster
from cloister.runs.policies import all_users_presets

if TYPE_CHECKING:
    import argparse

    from cloister.credentials.oauth_answers import Granted
    from cloister.policy.login import Login


class Listed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `--list`."""

    name: str
    preset: str = ""
    account: str = ""
    scopes: tuple[str, ...] = ()
    state: str = ""
    """`good`, `due`, `expired`, `ended`, or the reference of the error that reading it gives."""
    made: float | None = None
    renewed: float | None = None
    expires: float | None = None
    renewable: bool = False
    hosts: tuple[str, ...] = ()


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "login",
        "Log in to a provider; runs use the login, and never see its tokens.",
        prose=(
            "NAME is a preset that can be logged in to (claude, codex, or one of your own with [login]), or with "
            "--preset any name. The tokens are kept below the state directory, for you alone; the broker renews them, "
            "and puts them into requests of runs whose policy has a credential or a provider with the reference "
            "login:NAME. Nothing is stored until the provider has answered."
        ),
        examples=(
            ("cloister login claude", "log in by a browser"),
            ("cloister login claude --paste", "the browser is on another machine"),
            ("cloister login codex --from-product", "take over the login that Codex has made"),
            ("cloister login --list", "show logins, never a token"),
        ),
        exits=(("77", "the provider or the person refused"), ("75", "nobody logged in in time, or no network")),
    )
    verb.add_argument(
        "name", metavar="NAME", nargs="?", default="", help="of the login; also its preset's, unless given"
    )
    verb.add_argument("--preset", default="", metavar="PRESET", help="whose provider it is")
    way = verb.add_mutually_exclusive_group()
    way.add_argument("--device", action="store_true", help="enter a code on any device (RFC 8628)")
    way.add_argument("--paste", action="store_true", help="paste a code that the provider's page shows")
    way.add_argument(
        "--from-product", action="store_true", help="take over the product's own login; its copy stops working later"
    )
    way.add_argument("--list", action="store_true", help="list logins instead")
    verb.add_argument("--no-browser", action="store_true", help="only print the address")
    verb.json_option("name, preset, account, scopes, state, made, renewed, expires, renewable, hosts (a list)")
    return verb


def main(argv: list[str]) -> int:
    """Log in, or list.

    Raises:
        CloisterError: in all its kinds; nothing was stored then.
    """
    options = parser().read(argv)
    shelf = Shelf(records.places().logins)
    if options.list:
        _print([_listed(shelf, name) for name in shelf.names()], as_json=options.json)
        return 0
    if not options.name:
        raise UsageError("usage", "which login?", remedy="cloister login NAME, or cloister login --list")
    try:
        check_name(options.name)
    except ValueError as error:
        raise UsageError("usage", str(error), where=options.name) from None
    presets = all_users_presets(records.places(), os.getuid())
    preset, login = provider_for(options.name, options.preset, presets, shelf)
    granted, notice = _granted(options, login)
    kept = keep(shelf, options.name, preset, login, granted)
    _tell(notice)
    if options.json:
        output.print_json([_entry(describe(kept, time.time()))])
    else:
        whose = f" ({kept.account})" if kept.account else ""
        print(output.clean(f'logged in{whose}; policies name it "login:{kept.name}"'))
    return 0


def _granted(options: argparse.Namespace, login: Login) -> tuple[Granted, str]:
    """Log in as the person asked; return the tokens and what else there is to say."""
    send = poster(os.environ)
    terminal = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else -1
    person = Person(_tell, lambda address: not options.no_browser and _open(address), terminal)
    if options.from_product:
        granted, path = from_product(login, records.places().home, os.getuid())
        return granted, (
            f"From now on Cloister renews this login. At the first renewal the copy in {path} stops working:\n"
            "to use the product outside a sandbox after that, log in there again. Should the product renew it\n"
            "first, this login ends and you log in here again."
        )
    if options.device:
        return by_device(login, person, send), ""
    if options.paste:
        return by_paste(login, person, sys.stdin.readline, send), ""
    return by_browser(login, person, send), ""


def _open(address: str) -> bool:
    return open_browser(address, os.environ, os.getuid())


def _tell(text: str) -> None:
    """Show something to the person; what programs read goes to standard output."""
    if text:
        sys.stderr.write(output.clean_lines(text) + "\n")
        sys.stderr.flush()


def _listed(shelf: Shelf, name: str) -> Listed:
    try:
        return _entry(describe(load(shelf, name), time.time()))
    except CloisterError as error:
        return Listed(name=name, state=error.reference)


def _entry(found: Description) -> Listed:
    return Listed(
        name=found.name,
        preset=found.preset,
        account=found.account,
        scopes=found.scopes,
        state=found.state,
        made=found.made,
        renewed=found.renewed,
        expires=found.expires,
        renewable=found.renewable,
        hosts=found.hosts,
    )


def _print(entries: list[Listed], *, as_json: bool) -> None:
    if as_json:
        output.print_json(entries)
        return
    if not entries:
        print("there are no logins; `cloister login claude` makes one")
        return
    now = time.time()
    rows = [
        [
            entry.name,
            entry.preset or "-",
            entry.account or "-",
            entry.state,
            "-" if entry.expires is None else output.moment(entry.expires),
            "-" if entry.renewed is None else output.ago(entry.renewed, now),
            " ".join(entry.scopes) or "-",
        ]
        for entry in entries
    ]
    print(output.table(["NAME", "PROVIDER", "ACCOUNT", "STATE", "TOKEN UNTIL", "RENEWED", "SCOPES"], rows))
