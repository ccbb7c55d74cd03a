"""Parsing the arguments of a verb: argparse, whose mistakes become `UsageError` with a suggestion.

Each verb describes itself once, in its own `parser()`: help text, manual page (`manual`) and
completion (`completion`) are all made from that. `run`, `exec` and `shell` do not use this: they
are on the measured path and parse by hand.
"""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from cloister.errors import UsageError
from cloister.policy.units import parse_duration

Examples = tuple[tuple[str, str], ...]
"""Command lines, and what each does."""


class Parser(argparse.ArgumentParser):
    """The parser of one verb, with what the manual page says beyond the options."""

    def __init__(
        self, verb: str, summary: str, *, prose: str = "", examples: Examples = (), exits: Examples = ()
    ) -> None:
        """Describe a verb.

        Args:
            verb: the word after `cloister`.
            summary: one sentence, with a full stop.
            prose: the manual's DESCRIPTION beyond the summary.
            examples: command lines with their meaning.
            exits: exit codes of this verb beyond 0 and those of sysexits(3).
        """
        width = max((len(command) for command, _ in examples), default=0)
        shown = "\n".join(f"  {command:<{width}}  {what}" for command, what in examples)
        super().__init__(
            prog=f"cloister {verb}",
            description="\n\n".join(part for part in (summary, textwrap.fill(prose, 78)) if part),
            epilog=f"examples:\n{shown}" if shown else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help="show this text")
        self.verb = verb
        self.summary = summary
        self.prose = prose
        self.examples = examples
        self.exits = exits

    def error(self, message: str) -> NoReturn:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Turn a mistake into an error with something to type."""
        raise UsageError("usage", message, remedy=f"{self.prog} --help")

    def _check_value(self, action: argparse.Action, value: object) -> None:  # type: ignore[explicit-override]  # as above
        """Refuse a word that is none of those an argument takes: argparse's own message names no likely one."""
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        close = difflib.get_close_matches(str(value), known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
        name = action.metavar if isinstance(action.metavar, str) else "/".join(action.option_strings) or action.dest
        raise UsageError("usage", f"unknown {name.lower()} {value!r}", remedy=remedy)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse.

        Raises:
            UsageError: an option or argument is wrong; a misspelt option gets the nearest one.
        """
        found, unknown = self.parse_known_args(argv)
        if unknown:
            word = unknown[0]
            close = difflib.get_close_matches(word.partition("=")[0], self.option_names(), n=1)
            kind = "option" if word.startswith("-") else "argument"
            remedy = f"did you mean {close[0]}?" if close else f"{self.prog} --help"
            raise UsageError(f"{kind}-unknown", f"unknown {kind} {word!r}", remedy=remedy)
        return found

    def option_names(self) -> list[str]:
        """Return every option as typed."""
        return [name for action in self._actions for name in action.option_strings]

    def actions(self) -> list[argparse.Action]:
        """Return options and positional arguments in the order of the help text."""
        return list(self._actions)

    def json_option(self, keys: str) -> None:
        """Add `--json`; `keys` names the stable keys of what is printed."""
        self.add_argument("--json", action="store_true", help=f"print JSON with the keys {keys}")

    def run_argument(self, **settings: str) -> None:
        """Add the argument RUN."""
        self.add_argument("run", metavar="RUN", help="id of a run, the beginning of one, or `last`", **settings)  # type: ignore[arg-type]


def duration(text: str) -> float:
    """Return seconds for `90s`, `10m`, `8h` or `30d`; for argparse's `type`."""
    try:
        return float(parse_duration(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
