"""`cloister plan`: what `cloister run` would do with the same words, and nothing done.

Compiles in this process what the broker compiles in its own, from the same files.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.errors import UsageError
from cloister.host.owner import identify
from cloister.isolation import seccomp
from cloister.plan import render
from cloister.plan.steps import Plan
from cloister.runs import words
from cloister.runs.prepare import Kitchen, Prepared
from cloister.runs.request import RunRequest


def parser() -> Parser:
    """Describe the verb; the words themselves are parsed as `run` parses them."""
    verb = Parser(
        "plan",
        "Show what would be done for a run, and do nothing.",
        prose=(
            "Takes the options and words of `cloister run`. Prints the steps, the exact command line of bubblewrap "
            "(for an agent under systemd: the properties and mounts of its unit), the names of environment "
            "variables, egress rules, limits and opt-outs. Nothing is started or written."
        ),
        examples=(
            ("cloister plan claude", "what `cloister run claude` would do here"),
            ("cloister plan --json pi | jq .steps", "the plan as data"),
        ),
    )
    verb.add_argument("-C", "--directory", metavar="DIR", help="start in DIR instead of the current directory")
    verb.add_argument("--profile", metavar="NAME", help="lay [profiles.NAME] of the policy over the agent")
    verb.add_argument("-e", "--env", metavar="NAME", action="append", help="carry the variable NAME in (repeatable)")
    verb.add_argument("-y", "--yes", action="store_true", help="as in `run`")
    verb.add_argument("-d", "--detach", action="store_true", help="as in `run`")
    verb.add_argument("--no-pty", action="store_true", help="use pipes even on a terminal")
    verb.add_argument("-v", "--verbose", action="store_true", help="also the system calls that are refused, and why")
    verb.add_argument("--json", action="store_true", help="print the plan as JSON, the form in which it is stored")
    verb.add_argument("agent", metavar="AGENT", help="an agent of the policy")
    verb.add_argument("words", metavar="ARGUMENT", nargs="*", help="appended to its command; after `--` in its place")
    return verb


def main(argv: list[str]) -> int:
    """Parse as `run` does, and show.

    Raises:
        UsageError: the words are wrong, or no agent is named.
    """
    options, agent, command, replaced = words.parse(argv, {"-v": "verbose", "--verbose": "verbose"})
    if "help" in options:
        parser().print_help()
        return 0
    if not agent:
        raise UsageError(
            "agent-missing", "which agent?", remedy="cloister plan claude, or `cloister agents` for a list"
        )
    return show(options, agent, command, replaced=replaced)


def show(options: dict[str, str], agent: str, command: list[str], *, replaced: bool) -> int:
    """Print the plan of a run with these options, as `words.parse` returns them."""
    request = RunRequest(
        agent=agent,
        words=tuple(command),
        replaced=replaced,
        directory=str(Path(options.get("directory", ".")).absolute()),
        profile=options.get("profile", ""),
        environment=dict(os.environ),
        extra_names=tuple(name for name in options.get("env", "").split(",") if name),
        pty=os.isatty(0) and os.isatty(1) and "no-pty" not in options,
    )
    prepared = prepared_for(kitchen(), request)
    if "json" in options:
        sys.stdout.write(render.as_json(prepared.plan).decode())
        return 0
    print("\n".join(output.clean(line) for line in render.as_text(prepared.plan).splitlines()))
    if "verbose" in options:
        print("\n".join(["", "system calls", *(f"  {line}" for line in filter_lines(prepared.plan))]))
    return 0


def prepared_for(cook: Kitchen, request: RunRequest) -> Prepared:
    """Return the run that a request means, as the broker that would start it prepares it.

    Raises:
        CloisterError: what would stop it.
    """
    looked = cook.look(request)
    if looked.agent.isolation == "unit":
        from cloister.runs.unit_plan import prepare_unit_plan

        return prepare_unit_plan(cook, request, looked)
    return cook.prepare(request, looked=looked)


def kitchen() -> Kitchen:
    """Return a kitchen for this user that writes nothing."""
    places = records.places()
    return Kitchen(places, identify(places.home), writes=False)


def filter_lines(plan: Plan) -> list[str]:
    """Return what the plan's seccomp filter refuses, one group a line."""
    wanted = plan.launch.seccomp.split(",")
    return seccomp.describe(
        platform.machine(), nested="nested" in wanted, ptrace="ptrace" in wanted, netlink="netlink" in wanted
    )
