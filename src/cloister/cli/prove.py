"""`cloister prove`: attack an agent's sandbox and report what stopped each attack."""

from __future__ import annotations

import json
import os
import sys

from cloister.errors import UsageError

USAGE = """\
usage: cloister prove [OPTIONS] [AGENT]

Attack the sandbox of AGENT (default: shell) on this machine: start it as `cloister run`
would, try every known way out, and say what stopped each. Nothing is changed: canaries
and workspaces are made for it and removed, and it uses a broker of its own.

options:
      --case ID         try only this case (repeatable)
      --list            list the cases and the promises they prove
      --here            try the cases that need no workspace of their own in the current project
      --profile NAME    lay [profiles.NAME] of the policy over the agent
      --json            print JSON
      --junit FILE      write JUnit XML as well
      --ladder          compare: no sandbox, the agent's own, hardened, Cloister
  -h, --help            show this text

exit codes: 0 every attack was denied, 1 an attack got through, 69 something could not
be tried or proved nothing.
"""
_FLAGS = {"--list": "list", "--here": "here", "--json": "json", "--ladder": "ladder", "-h": "help", "--help": "help"}
_VALUES = {"--case": "case", "--profile": "profile", "--junit": "junit"}


def main(argv: list[str]) -> int:
    """Parse, run the battery, print."""
    options, names, agent = parse(argv)
    if "help" in options:
        sys.stdout.write(USAGE)
        return 0
    import msgspec

    from cloister.prove import battery, report

    cases = battery.select(tuple(names))
    if "list" in options:
        return _list([report.describe(case) for case in cases], as_json="json" in options)
    if "ladder" in options:
        from cloister.prove import ladder

        rungs = ladder.climb(agent, os.environ)
        print(json.dumps([msgspec.to_builtins(rung) for rung in rungs], indent=2) if "json" in options else ladder.table(rungs))
        return ladder.exit_code(rungs)
    progress = _Progress(len(cases))
    here = battery.refuse_here(".") if "here" in options else ""
    results = battery.prove(
        agent, cases, os.environ, profile=options.get("profile", ""), here=here, on_result=progress.step
    )
    progress.done()
    if "junit" in options:
        with open(options["junit"], "w", encoding="utf-8") as file:
            file.write(report.junit(results, agent))
    if "json" in options:
        print(json.dumps(report.as_json(results, agent), indent=2))
    else:
        print(report.text(results, battery.promises()))
    return report.exit_code(results)


def parse(argv: list[str]) -> tuple[dict[str, str], list[str], str]:
    """Return options, the ids of cases, and the agent.

    Raises:
        UsageError: an unknown option, one without its value, or two agents.
    """
    options: dict[str, str] = {}
    names: list[str] = []
    agents: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in _FLAGS:
            options[_FLAGS[word]] = "1"
        elif name in _VALUES:
            if not equals and not words:
                raise UsageError("value-missing", f"{name} needs a value", remedy="cloister prove --help")
            given = value if equals else words.pop(0)
            if name == "--case":
                names.append(given)
            else:
                options[_VALUES[name]] = given
        elif word.startswith("-"):
            raise UsageError("option-unknown", f"unknown option {word}", remedy="cloister prove --help")
        else:
            agents.append(word)
    if len(agents) > 1:
        raise UsageError("argument-surplus", "one agent at a time", remedy=f"cloister prove {agents[0]}")
    return options, names, agents[0] if agents else "shell"


def _list(cases: list[dict[str, object]], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(cases, indent=2))
        return 0
    for case in cases:
        print(f"{case['id']!s:32} {case['promise']}  {case['title']}")
    return 0


class _Progress:
    """A counter on a terminal's last line; nothing elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._count = 0
        self._shown = sys.stderr.isatty()

    def step(self, result: object) -> None:
        """Count one more."""
        self._count += 1
        if self._shown:
            name = getattr(getattr(result, "case", None), "id", "")
            sys.stderr.write(f"\r\033[K{self._count}/{self._total} {name}")
            sys.stderr.flush()

    def done(self) -> None:
        """Clear the line."""
        if self._shown:
            sys.stderr.write("\r\033[K")
