"""`cloister prove`: attack an agent's sandbox and report what stopped each attack.

Exit status 0 when nothing got through, 1 when an attack did, 69 when something could not be
tried or proved nothing. The battery itself is the room `prove`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from cloister.cli.arguments import Parser
from cloister.cli.output import print_json
from cloister.errors import UsageError
from cloister.prove import battery, ladder, report
from cloister.prove.runner import Result


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "prove",
        "Attack an agent's sandbox on this machine, and say what stopped each attack.",
        prose=(
            "Starts the sandbox as `cloister run` would, with the agent's own policy, and tries every known way out. "
            "Canaries (secret files, listeners, a process) and workspaces are made for it and removed afterwards; "
            "it uses a broker of its own, so running agents are not disturbed. What the policy allows by name is "
            "reported as opted out, not as passed; what the policy does not have (credentials, models, logins) is "
            "counted and left out. The agent's real secrets are read by their references, on this side, and looked for "
            "in everything that comes out; bound hosts are asked for their head (`HEAD /`), providers of models for "
            "nothing. Needs /usr/bin/python3 inside the sandbox."
        ),
        examples=(
            ("cloister prove", "the whole battery against the agent `shell`"),
            ("cloister prove claude --junit prove.xml", "against an agent of the policy, for CI"),
            ("cloister prove --case git-hooks", "one attack"),
            ("cloister prove codex --ladder", "no sandbox, the agent's own, hardened, Cloister"),
        ),
        exits=(("1", "an attack got through"), ("69", "something could not be tried, or proved nothing")),
    )
    verb.add_argument("agent", metavar="AGENT", nargs="?", default="shell", help="agent of the policy (default: shell)")
    verb.add_argument("--case", metavar="ID", action="append", default=[], help="try only this case (repeatable)")
    verb.add_argument("--list", action="store_true", help="list the cases and the promises they prove; try nothing")
    verb.add_argument(
        "--here", action="store_true", help="use the current project for cases that do not touch the workspace"
    )
    verb.add_argument("--profile", metavar="NAME", default="", help="lay [profiles.NAME] of the policy over the agent")
    verb.add_argument("--junit", metavar="FILE", default="", help="write JUnit XML to FILE as well")
    verb.add_argument("--ladder", action="store_true", help="compare postures by three canaries instead")
    verb.json_option("agent, counts, exit_code, cases")
    return verb


def main(argv: list[str]) -> int:
    """Run the battery and print what came of it; return 0, 1 or 69.

    Raises:
        CloisterError: an option, the policy or the host is wrong.
    """
    arguments = parser().read(argv)
    if arguments.ladder:
        return _ladder(arguments)
    cases = battery.select(tuple(arguments.case))
    if arguments.list:
        listed = [report.describe(case) for case in cases]
        print_json(listed) if arguments.json else print("\n".join(report.listing(cases)))
        return 0
    # So that canaries and workspaces go also when something ends us politely; Ctrl-C does so by itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    progress = _Progress(len(cases))
    here = battery.refuse_here(".") if arguments.here else ""
    results = battery.prove(
        arguments.agent, cases, os.environ, profile=arguments.profile, here=here, on_result=progress.step
    )
    progress.done()
    if arguments.junit:
        _write(arguments.junit, report.junit(results, arguments.agent))
    if arguments.json:
        print_json(report.as_json(results, arguments.agent))
    else:
        print(report.text(results, battery.promises()))
    return report.exit_code(results)


def _ladder(arguments: argparse.Namespace) -> int:
    rungs = ladder.climb(arguments.agent, os.environ)
    print_json(rungs) if arguments.json else print(ladder.table(rungs))
    return ladder.exit_code(rungs)


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:  # the path as typed
            file.write(text)
    except OSError as error:
        raise UsageError("junit-unwritable", f"cannot be written: {error.strerror}", where=path) from error


class _Progress:
    """A counter on a terminal's last line; nothing elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._count = 0
        self._shown = sys.stderr.isatty()

    def step(self, result: Result) -> None:
        """Count one more."""
        self._count += 1
        if self._shown:
            sys.stderr.write(f"\r\033[K{self._count}/{self._total} {result.case.id}")
            sys.stderr.flush()

    def done(self) -> None:
        """Clear the line."""
        if self._shown:
            sys.stderr.write("\r\033[K")
