"""`cloister agents`: who is in the policy, and how strongly each is held."""

from __future__ import annotations

import os

import msgspec

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.policy.merge import ResolvedAgent
from cloister.runs.policies import PolicyFiles
from cloister.runs.unenforced import unenforced_keys


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One agent, as `--json` prints it."""

    name: str
    preset: str
    command: tuple[str, ...]
    isolation: str
    workspace: str
    egress: str
    hosts: int
    unenforced: tuple[str, ...]
    """Keys for which this version refuses to start it."""


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "agents",
        "List the agents of the policy.",
        prose="An agent that asks for more than this version can enforce is listed as refused, with the keys to blame.",
        examples=(("cloister agents", "whom `cloister run` can start"),),
    )
    verb.add_argument("-q", "--quiet", action="store_true", help="print only names")
    verb.json_option("name, preset, command, isolation, workspace, egress, hosts, unenforced")
    return verb


def main(argv: list[str]) -> int:
    """Print the list.

    Raises:
        PolicyError: a policy file is wrong, or there is none.
    """
    options = parser().read(argv)
    files = PolicyFiles(records.places(), os.getuid())
    entries = [_entry(files.resolve(name)) for name in files.document().tables.get("agents", {})]
    if options.json:
        output.print_json(entries)
    elif options.quiet:
        print("".join(f"{entry.name}\n" for entry in entries), end="")
    elif not entries:
        print("the policy has no agents; `cloister init --print` shows what one looks like")
    else:
        heads = ["AGENT", "PRESET", "ISOLATION", "WORKSPACE", "EGRESS", "COMMAND"]
        print(output.table(heads, [_row(entry) for entry in entries]))
    return 0


def _entry(resolved: ResolvedAgent) -> Entry:
    agent = resolved.agent
    return Entry(
        name=resolved.name,
        preset=agent.preset,
        command=agent.command,
        isolation=agent.isolation,
        workspace=agent.workspace.mode,
        egress=agent.egress.mode,
        hosts=len(agent.egress.allow),
        unenforced=unenforced_keys(agent),
    )


def _row(entry: Entry) -> list[str]:
    command = " ".join(entry.command)
    if entry.unenforced:
        command += f"  (refused: {', '.join(entry.unenforced)} is for another isolation)"
    hosts = f"{entry.egress}, {entry.hosts} rule{'' if entry.hosts == 1 else 's'}"
    return [entry.name, entry.preset or "-", entry.isolation, entry.workspace, hosts, command]
