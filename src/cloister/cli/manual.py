"""The manual pages as roff: `python -m cloister.cli.manual docs/man` writes cloister(1) and one page per verb.

Made from what the verbs say about themselves: a `parser()`, or the `USAGE` text of those that
parse by hand. References of errors are read from the sources, so none is forgotten. Macros:
man(7). A test fails when a committed page is not what this makes.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cloister.cli.arguments import Examples, Parser
from cloister.cli.entry import RUNNERS, VERBS

SOURCE = Path(__file__).parent.parent
_REFERENCE = re.compile(r"[a-z]+(?:-[a-z]+)+")
_ERRORS = {
    "UsageError": 64,
    "UnsupportedError": 69,
    "StepError": 71,
    "RetryError": 75,
    "DeniedError": 77,
    "PolicyError": 78,
}
_NOTE = '.\\" Made from the sources by python -m cloister.cli.manual; do not edit.\n'

SYSEXITS: Examples = (
    ("0", "done"),
    ("64", "the command line is wrong"),
    ("69", "this host, or this version, cannot enforce the policy"),
    ("70", "a bug in cloister"),
    ("71", "the host refused a step"),
    ("75", "passing trouble: try again"),
    ("77", "the policy does not allow it"),
    ("78", "a policy file is wrong, or there is none"),
    ("130", "interrupted"),
)
RUN_EXITS: Examples = (
    ("n", "the command's own exit code"),
    ("124", "ended after its runtime_max"),
    ("125", "cloister failed, so the command did not run or was ended"),
    ("126", "the command cannot be executed"),
    ("127", "the command was not found"),
    ("128+n", "ended by signal n"),
)
FILES: Examples = (
    ("~/.config/cloister/cloister.toml", "the user's policy, see cloister.toml(5)"),
    ("~/.config/cloister/presets/NAME.toml", "the user's own presets"),
    ("~/.config/cloister/decisions.json", "answers given with always and never"),
    ("~/.config/cloister/prices.toml", "own prices of models, before those that come with Cloister"),
    ("/etc/cloister/cloister.toml", "the system's policy"),
    (".cloister.toml", "a project's file, which may only tighten"),
    ("~/.local/state/cloister/runs/", "one directory per run: plan, record, events, receipt, output"),
    ("~/.local/state/cloister/agents/", "agents' own state, by agent and project"),
    ("~/.local/state/cloister/ledger/", "model calls: the ledger, and the journal of what is not in it yet"),
    ("$XDG_RUNTIME_DIR/cloister/", "the broker's socket, and what exists only while a run lasts"),
)
ENVIRONMENT: Examples = (
    ("HOME, XDG_CONFIG_HOME, XDG_STATE_HOME, XDG_RUNTIME_DIR", "where the files above are"),
    ("PATH", "where the programs of agents are found"),
    ("NO_COLOR", "set to anything: no colours"),
    ("CLOISTER_BROKER_IDLE_S", "seconds after which an idle broker ends (300)"),
)


class Option(NamedTuple):
    """One option or argument: its names, what its value is called, what it does."""

    names: tuple[str, ...]
    value: str
    text: str
    choices: tuple[str, ...] = ()


class VerbText(NamedTuple):
    """Everything known about a verb."""

    verb: str
    summary: str
    synopsis: tuple[str, ...]
    prose: str
    options: tuple[Option, ...]
    arguments: tuple[Option, ...]
    examples: Examples
    exits: Examples


def described_verbs() -> list[str]:
    """Return the verbs that have a `parser()`."""
    return [verb for verb in VERBS if hasattr(_module(verb), "parser")]


@cache
def texts() -> tuple[VerbText, ...]:
    """Return the text of each verb there is, in the order of `cloister help`."""
    found = []
    for verb in VERBS:
        module = _module(verb)
        if hasattr(module, "parser"):
            found.append(from_parser(module.parser()))
        elif hasattr(module, "USAGE"):
            found.append(from_usage(verb, module.USAGE))
    return tuple(found)


def _module(verb: str) -> object:
    name = f"cloister.cli.{verb}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def from_parser(parser: Parser) -> VerbText:
    """Read a parser; the actions of `policy` and `identity` become options under their own names."""
    options, arguments = [], []
    for action in parser.actions():
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001  # argparse has no public name for it
            arguments.append(Option((), "ACTION", "what to do", tuple(action.choices)))
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001  # same
            for name, below in action.choices.items():
                usage = " ".join(below.format_usage().split())  # argparse breaks long ones
                options.append(Option((usage.split(f"cloister {parser.verb} ", 1)[1],), "", helps[name]))
            arguments.append(Option((), "AGENT", ""))  # of `show`; completion asks for it behind the action
            continue
        value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
        option = Option(tuple(action.option_strings), value, action.help or "", tuple(action.choices or ()))
        (options if action.option_strings else arguments).append(option)
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    return VerbText(
        parser.verb,
        parser.summary,
        (usage,),
        parser.prose,
        tuple(options),
        tuple(arguments),
        parser.examples,
        parser.exits,
    )


def from_usage(verb: str, usage: str) -> VerbText:
    """Read the help text of a verb that parses by hand."""
    head, *rest = usage.strip().split("\n\n")
    synopsis = tuple(line.removeprefix("usage:").strip() for line in head.splitlines())
    prose, options, exits = [], [], []
    for part in rest:
        if part.startswith("options:"):
            options = [_option(line) for line in part.splitlines()[1:]]
        elif part.startswith("exit codes:"):
            exits = re.findall(r"\b(\d+) ([a-z][^,]*?)(?:,|\.$)", " ".join(part.split()))
        else:
            prose.append(" ".join(part.split()))
    summary, _, more = prose[0].partition(". ")
    arguments = tuple(Option((), word, "") for word in _ARGUMENTS.get(verb, ()))
    return VerbText(
        verb,
        f"{summary.rstrip('.')}.",
        synopsis,
        " ".join([more, *prose[1:]]).strip(),
        tuple(options),
        arguments,
        (),
        () if verb in RUNNERS else tuple(exits),
    )


_ARGUMENTS = {"run": ("AGENT",), "shell": ("AGENT",), "exec": ("RUN",), "prove": ("AGENT",)}


def _option(line: str) -> Option:
    names, text = re.split(r" {2,}", line.strip(), maxsplit=1)
    words = names.replace(",", "").split()
    value = "" if words[-1].startswith("-") else words.pop()
    return Option(tuple(words), value, text)


def page(text: VerbText) -> str:
    """Return the page of one verb."""
    runner = text.verb in RUNNERS
    parts = [
        f'{_NOTE}.TH CLOISTER-{text.verb.upper()} 1 "" "Cloister" "User commands"\n',
        f".SH NAME\ncloister\\-{text.verb} \\- {_plain(VERBS[text.verb])}\n",
        ".SH SYNOPSIS\n" + ".br\n".join(f".B {_plain(line)}\n" for line in text.synopsis),
        f".SH DESCRIPTION\n{_prose(text.summary)}" + (f".PP\n{_prose(text.prose)}" if text.prose else ""),
        _options("ARGUMENTS", [one for one in text.arguments if one.text]),
        _options("OPTIONS", list(text.options)),
        _table("EXIT STATUS", RUN_EXITS if runner else _exits(text.exits)),
        _table("EXAMPLES", text.examples),
        ".SH SEE ALSO\n.BR cloister (1),\n.BR cloister.toml (5)\n",
    ]
    return "".join(parts)


def _exits(own: Examples) -> Examples:
    """Return sysexits(3) with a verb's own codes in their places."""
    return tuple(sorted({**dict(SYSEXITS), **dict(own)}.items(), key=lambda row: int(row[0])))


def main_page() -> str:
    """Return cloister(1)."""
    verbs = tuple((f"cloister-{verb}(1)", VERBS[verb]) for verb in (text.verb for text in texts()))
    about = (
        "Cloister runs AI agents on Linux where they cannot hurt their owner. One policy file says what each agent may "
        "read, write and reach; what it does not say is not allowed. The agent runs in a sandbox of its own: system "
        "directories read-only, an empty home, the project, and no network but a proxy that obeys the policy. Every "
        "run leaves a receipt."
    )
    how = (
        "A broker per user starts on demand, holds the policy, supervises the runs and ends when idle. Nothing needs "
        "root. When any process of a run is killed, the run ends."
    )
    return "".join(
        [
            f'{_NOTE}.TH CLOISTER 1 "" "Cloister" "User commands"\n',
            ".SH NAME\ncloister \\- run AI agents where they cannot hurt their owner\n",
            ".SH SYNOPSIS\n.B cloister\n.I VERB\n.RI [ ARGUMENT ...]\n",
            f".SH DESCRIPTION\n{_prose(about)}.PP\n{_prose(how)}",
            _table("VERBS", verbs),
            _table(
                "BEGIN",
                (
                    ("cloister doctor", "what can this host enforce?"),
                    ("cloister init", "write a first policy"),
                    ("cloister run claude", "start an agent in the project here"),
                    ("cloister receipt last", "what did it do?"),
                ),
            ),
            ".SH EXIT STATUS\n.BR run ,\n.B exec\nand\n.B shell\nspeak as\n.BR env (1)\ndoes:\n" + _rows(RUN_EXITS),
            ".PP\nAll other verbs speak as\n.BR sysexits (3)\ndoes:\n" + _rows(SYSEXITS),
            _table("FILES", FILES),
            _table("ENVIRONMENT", ENVIRONMENT),
            ".SH ERRORS\nEvery error ends in a reference in brackets, which stays the same between versions:\n",
            _rows(tuple((f"{name} ({code})", message) for name, (code, message) in sorted(references().items()))),
            ".SH SEE ALSO\n.BR cloister.toml (5),\n.BR bwrap (1),\n.BR landlock (7),\n.BR seccomp (2)\n",
        ]
    )


def references(source: Path = SOURCE) -> dict[str, tuple[int, str]]:
    """Return every error reference in the sources, with its exit code and message; parts known later show as `...`."""
    found: dict[str, tuple[int, str]] = {}
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name.endswith("Error") and len(node.args) >= 2:  # noqa: PLR2004  # reference and message
                reference = _constant(node.args[0])
                if _REFERENCE.fullmatch(reference):
                    found.setdefault(reference, (_ERRORS.get(name, 70), _constant(node.args[1])))
            for keyword in node.keywords:
                if keyword.arg == "reference" and _REFERENCE.fullmatch(_constant(keyword.value)):
                    found.setdefault(_constant(keyword.value), (_ERRORS["PolicyError"], ""))
    return found


def _constant(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_constant(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _options(title: str, options: list[Option]) -> str:
    if not options:
        return ""
    rows = []
    for option in options:
        names = ", ".join(f"\\fB{_plain(name)}\\fR" for name in option.names) or f"\\fI{_plain(option.value)}\\fR"
        value = f" \\fI{_plain(option.value)}\\fR" if option.names and option.value else ""
        choices = f" One of {', '.join(option.choices)}." if option.choices else ""
        rows.append(f".TP\n{names}{value}\n{_prose(option.text.rstrip('.') + '.' + choices)}")
    return f".SH {title}\n" + "".join(rows)


def _table(title: str, rows: Examples) -> str:
    return f".SH {title}\n{_rows(rows)}" if rows else ""


def _rows(rows: Examples) -> str:
    return "".join(f".TP\n.B {_plain(name)}\n{_prose(text or 'see the text of the message')}" for name, text in rows)


def _prose(text: str) -> str:
    """Return running text: one line per sentence, `code` in bold, nothing that roff would obey."""
    lines = re.sub(r"(?<=[a-z)`\"][.:]) (?=[A-Z`])", "\n", " ".join(text.split())).split("\n")
    shown = [re.sub(r"`([^`]+)`", r"\\fB\1\\fR", _plain(line)) for line in lines]
    return "".join(f"{line}\n" for line in shown)


def _plain(text: str) -> str:
    """Return text in which roff finds no command; hyphens and tildes stay what can be copied."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti").replace("^", "\\(ha").replace("…", "...")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def pages() -> dict[str, str]:
    """Return all pages by file name."""
    return {"cloister.1": main_page()} | {f"cloister-{text.verb}.1": page(text) for text in texts()}


def main() -> int:
    """Write the pages into the directory that is named."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
