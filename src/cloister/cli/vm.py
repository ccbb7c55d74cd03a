"""`cloister vm`: virtual machines of agents. Each group of actions is a module of its own, as `vm_list`.

`stop`, `logs`, `exec` and `console` are the verbs of all runs; here they also take an agent's name.
"""

from __future__ import annotations

import importlib
from typing import Any

from cloister.cli import records
from cloister.cli.arguments import Parser
from cloister.errors import UsageError
from cloister.plan.vm import VmLaunch
from cloister.runs.listing import Row, list_runs

ACTIONS = {
    "start": "start", "list": "list", "stats": "list", "balloon": "list", "cp": "copy", "snapshot": "keep",
    "restore": "keep", "fork": "keep", "warm": "warm", "snapshots": "warm", "rm": "warm",
}  # fmt: skip
"""Each belongs to a module `cloister.cli.vm_WORD` with `describe(parsers)` and `main(options)`."""
EDGES = {"stop": ("stop",), "logs": ("logs",), "exec": ("exec",), "console": ("logs", "--console")}
"""Verbs of all runs, with what goes before their words."""
_COMMAND = ("start", "restore")
"""Actions that take a command after `--`."""


class Action(Parser):
    """The parser of one action: argparse names it by its `prog`."""

    def __init__(self, **settings: str) -> None:
        """Take what `add_parser` knows."""
        super().__init__(settings["prog"].removeprefix("cloister "), "")


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "vm",
        "Start, list and keep the virtual machines of agents.",
        prose=(
            'For agents with `isolation = "microvm"`. `cloister run` starts them as well; `vm start` leaves them '
            "running. MACHINE is the id of a run, the beginning of one, `last`, or the name of an agent of which one "
            "machine lives. A template is a guest that has booted and was told nothing yet: starts from it are fast; "
            "one is made after the first start, or by `vm warm`. A snapshot keeps the disks of a living machine, and "
            "not its memory: what is started from it finds the files, and has an id, keys and tokens of its own. "
            "`stop`, `logs` and `exec` are the verbs of those names; `console` is `logs --console`."
        ),
        examples=(
            ("cloister vm start claude --mem 512", "start one, and leave it running"),
            ("cloister vm list", "what lives, and what it takes"),
            ("cloister vm exec claude -- git status", "another command in it"),
            ("cloister vm cp claude:/workspace/out.txt .", "a copy out of it"),
            ("cloister vm snapshot claude before", "keep its disks"),
            ("cloister vm restore before", "start another one with them"),
            ("cloister vm fork claude -n 3", "three more, as it is now"),
        ),
    )
    actions = verb.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Action)
    for word in dict.fromkeys(ACTIONS.values()):
        _module(word).describe(actions)
    for name, target in EDGES.items():
        one = actions.add_parser(name, help=f"as `cloister {' '.join(target)}`", add_help=False)
        one.add_argument("words", metavar="MACHINE", nargs="*", help="its arguments")
    return verb


def main(argv: list[str]) -> int:
    """Do one action.

    Raises:
        CloisterError: in all its kinds.
    """
    if argv[:1] and argv[0] in EDGES:
        verb, *front = EDGES[argv[0]]
        code: int = importlib.import_module(f"cloister.cli.{verb}").main([*front, *_named(argv[0], argv[1:])])
        return code
    command: list[str] = []
    if argv[:1] and argv[0] in _COMMAND and "--" in argv:
        at = argv.index("--")
        argv, command = argv[:at], argv[at + 1 :]
        if not command:
            raise UsageError(
                "command-missing", "there is no command after `--`", remedy="cloister vm start shell -- ls"
            )
    options = parser().read(argv)
    options.command = command
    done: int = _module(ACTIONS[options.action]).main(options)
    return done


def machine(word: str) -> tuple[str, VmLaunch]:
    """Return the living run that a word means, and its machine.

    Raises:
        UsageError: none, several, or one without a machine.
    """
    run = _by_agent(word) or _by_id(word)
    plan = records.store().plan(run)
    vm = plan.launch.vm if plan else None
    if vm is None:
        raise UsageError("vm-not", f"the run {run} has no virtual machine", remedy="cloister vm list")
    if run not in (records.living() or ()):
        raise UsageError("run-not-alive", f"the run {run} is over", remedy="cloister vm list --all")
    return run, vm


def rows(*, everything: bool) -> list[tuple[Row, VmLaunch]]:
    """Return runs that have machines, oldest first."""
    store = records.store()
    found = []
    for row in list_runs(store, records.living(), everything=everything):
        plan = store.plan(row.id)
        if plan and plan.steps and plan.launch.vm:
            found.append((row, plan.launch.vm))
    return found


def _by_agent(word: str) -> str:
    """Return the run of the one living machine of an agent; empty where there is none.

    Raises:
        UsageError: there are several.
    """
    found = [row.id for row, _ in rows(everything=False) if row.agent == word and row.status != "died"]
    if len(found) > 1:
        raise UsageError(
            "run-unknown",
            f"{len(found)} machines of {word} live: {', '.join(found)}",
            remedy="cloister vm list, and name one by its id",
        )
    return found[0] if found else ""


def _by_id(word: str) -> str:
    """Return the run that a word begins.

    Raises:
        UsageError: none or several.
    """
    try:
        return records.store().find(word)
    except UsageError as error:
        remedy = f"cloister vm list; or cloister vm start {word}"
        raise UsageError(
            error.reference, f"{error.message}, and no machine of an agent called so", remedy=remedy
        ) from None


def _named(verb: str, words: list[str]) -> list[str]:
    """Put runs in the places of agents' names: all words of `stop`, of other verbs the first one that names a run.

    What has ended can still be read: for `logs` and `console` the newest machine of an agent will do.

    Raises:
        UsageError: the first word means no run.
    """
    ended = verb in ("logs", "console")
    found = list(words)
    for index, word in enumerate(words):
        if word == "--":
            break
        run = "" if word.startswith("-") else _by_agent(word) or (_newest(word) if ended else "")
        if run:
            found[index] = run
            if verb != "stop":
                break
    if found == words and words and not words[0].startswith("-"):
        _by_id(words[0])
    return found


def _newest(word: str) -> str:
    return next((row.id for row, _ in reversed(rows(everything=True)) if row.agent == word), "")


def _module(word: str) -> Any:
    return importlib.import_module(f"cloister.cli.vm_{word}")
