"""`cloister policy`: reload it for running sandboxes, print its schema, its presets, or one agent as resolved."""

from __future__ import annotations

import os

import msgspec

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.plan.unit import HOSTD_SOCKET
from cloister.policy.document import show_path
from cloister.policy.model import Policy, Preset, Project
from cloister.policy.schema import json_schema
from cloister.runs.checking import Checker, as_error
from cloister.runs.policies import PolicyFiles

_KINDS: dict[str, type[msgspec.Struct]] = {"policy": Policy, "preset": Preset, "project": Project}


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "policy",
        "Reload the policy of running sandboxes; print its schema, presets, or an agent as resolved.",
        prose=(
            "`reload` brings egress rules, models and budgets as they are now to every running sandbox; a broken "
            "policy changes nothing. Mounts and limits of a running sandbox stay. `show` prints what an agent may do "
            "after preset, profile and system policy, each key with where it was written. `schema` prints JSON Schema "
            "for editors."
        ),
        examples=(
            ("cloister policy reload", "after editing the file"),
            ("cloister policy show claude", "what is really in force, and why"),
            ("cloister policy schema > policy.json", "for an editor that completes TOML"),
        ),
    )
    verbs = verb.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=_Action)
    reload = verbs.add_parser("reload", help="bring the policy to running sandboxes")
    reload.add_argument("--json", action="store_true", help="print JSON with the key reloaded")
    schema = verbs.add_parser("schema", help="print the JSON Schema of a file")
    schema.add_argument("kind", nargs="?", choices=sorted(_KINDS), default="policy", help="which file (policy)")
    show = verbs.add_parser("show", help="print one agent, resolved")
    show.add_argument("agent", metavar="AGENT", help="an agent of the policy")
    show.add_argument("--profile", metavar="NAME", default="", help="lay [profiles.NAME] over it")
    show.add_argument("--json", action="store_true", help="print JSON with the keys agent, sources")
    presets = verbs.add_parser("presets", help="list presets, built-in and your own")
    presets.add_argument("--json", action="store_true", help="print JSON, by name")
    return verb


class _Action(Parser):
    """The parser of one action: argparse names it by its `prog`."""

    def __init__(self, **settings: str) -> None:
        """Take what `add_parser` knows."""
        super().__init__(settings["prog"].removeprefix("cloister "), "")


def main(argv: list[str]) -> int:
    """Do one action.

    Raises:
        PolicyError: a policy file is wrong, or there is none.
    """
    options = parser().read(argv)
    match options.action:
        case "reload":
            return _reload(as_json=options.json)
        case "schema":
            output.print_json(json_schema(_KINDS[options.kind]))
        case "show":
            _show(options.agent, options.profile, as_json=options.json)
        case _:
            _presets(as_json=options.json)
    return 0


def _reload(*, as_json: bool) -> int:
    """Check first, so that a mistake is shown here with its line; then ask the broker, if there is one."""
    checker = Checker(records.places(), os.getuid())
    report = checker.everything("")
    if report.problems:
        raise as_error(report)
    answer = records.control({"verb": "reload"})["reloaded"] if records.living() else []
    failed = [one for one in answer if "error" in one]
    if as_json:
        output.print_json({"reloaded": answer})
    for one in [] if as_json else answer:
        revoked = f"  credentials taken back: {one['revoked']}" if one.get("revoked") else ""
        print(f"{one['run']}  {output.clean(one.get('error') or 'policy ' + one.get('policy', '')[:16] + revoked)}")
    if not answer and not as_json:
        print("no living runs; the next start reads the policy anyway")
    if not as_json and os.path.exists(HOSTD_SOCKET):
        print("agents under systemd follow the system's policy: sudo systemctl reload cloister-proxyd")
    return 1 if failed else 0


def _show(name: str, profile: str, *, as_json: bool) -> None:
    files = PolicyFiles(records.places(), os.getuid())
    resolved = files.resolve(name, profile)
    sources = {show_path(path): where for path, where in resolved.sources.items()}
    if as_json:
        output.print_json({"agent": resolved.agent, "sources": sources})
        return
    rows = list(_leaves(msgspec.to_builtins(resolved.agent), ()))
    width = max((len(show_path(path)) for path, _ in rows), default=0)
    for path, value in rows:
        where = resolved.source(path)
        shown = f"{show_path(path):<{width}}  {msgspec.json.encode(value).decode()}"
        print(output.clean(shown) + (output.colour(f"  # {output.clean(where)}", "dim") if where else ""))


def _leaves(value: object, path: tuple[str | int, ...]) -> list[tuple[tuple[str | int, ...], object]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
    if isinstance(value, list | tuple) and value:
        return [leaf for index, item in enumerate(value) for leaf in _leaves(item, (*path, index))]
    return [(path, value)]


def _presets(*, as_json: bool) -> None:
    files = PolicyFiles(records.places(), os.getuid())
    presets = files.presets()
    if as_json:
        output.print_json(dict(presets))
        return
    rows = [[name, " ".join(preset.command), preset.description] for name, preset in sorted(presets.items())]
    print(output.table(["PRESET", "COMMAND", "DESCRIPTION"], rows))
