"""`cloister check`: all mistakes of all policy files at once, and what this version cannot enforce yet."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.errors import PolicyError, render
from cloister.host.workspace_probe import find_project
from cloister.runs.checking import Checker, Report, as_error


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "check",
        "Check policy files, and report every mistake with its line.",
        prose=(
            "Without FILE: the system's policy, the user's with its presets, and .cloister.toml of the project here, "
            "also against each other. A FILE named .cloister.toml is taken for a project file, one in the directory "
            "of presets for a preset, any other for a policy. Warnings name what is valid but not enforced by this "
            "version: an agent that asks for it is refused at its start."
        ),
        examples=(("cloister check", "the files that count here"), ("cloister check draft.toml", "a file by itself")),
    )
    verb.add_argument("files", metavar="FILE", nargs="*", help="files to check instead")
    verb.json_option("files, problems, warnings")
    return verb


def main(argv: list[str]) -> int:
    """Print findings; return 0, or 78 when a file is wrong."""
    options = parser().read(argv)
    places = records.places()
    checker = Checker(places, os.getuid())
    if options.files:
        for path in options.files:
            checker.file(path)
    else:
        checker.everything(find_project(os.path.realpath(Path.cwd()), home=places.home))
    report = checker.report
    if options.json:
        output.print_json(report)
    else:
        _print(report)
    return PolicyError.exit_code if report.problems else 0


def _print(report: Report) -> None:
    for file in report.files:
        mark = output.colour("ok", "green") if file.good else output.colour("WRONG", "red")
        agents = f": {', '.join(file.agents)}" if file.agents else ""
        print(f"{mark}  {output.clean(file.path)} ({file.kind}){output.clean(agents)}")
    for warning in report.warnings:
        where = f"{warning.where}: " if warning.where else ""
        print(f"{output.colour('warning', 'yellow')}  {output.clean(where + warning.message)}")
        print(f"  try: {output.clean(warning.remedy)}")
    if report.problems:
        sys.stdout.flush()
        sys.stderr.write(render(as_error(report)) + "\n")
