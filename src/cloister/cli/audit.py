"""`cloister audit`: ask the log of the audit. Each action is a module of its own, as `audit_tail`."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from cloister.cli.arguments import Parser

ACTIONS = ("tail", "query", "stats", "rules", "verify", "export")
"""Each is a module `cloister.cli.audit_ACTION` with `describe(parsers)` and `main(options)`."""


class Action(Parser):
    """The parser of one action: argparse names it by its `prog`."""

    def __init__(self, **settings: str) -> None:
        """Take what `add_parser` knows."""
        super().__init__(settings["prog"].removeprefix("cloister "), "")


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "audit",
        "Ask the log of the audit: what agents did, and what was done to their sandboxes.",
        prose=(
            "The log is the system's (/var/log/cloister/audit) where this user may read it, else the user's own; "
            "--system and --own choose. All conditions must hold; of one that is given several times, any. KIND is a "
            "name such as file.opened, the part before its dot, a pattern, or the number of an OCSF class. Patterns "
            "are those of glob(7), where * stands for / too. Times are 10m, 2h, 7d, 2026-11-01, 2026-11-01T14:30 "
            "(UTC) or `today`. The first question builds an index in ~/.local/state/cloister/audit-index, later ones "
            "what has been added since; it is a cache, and may be removed. --json prints events as they are recorded, "
            "one JSON object per line."
        ),
        examples=(
            ("cloister audit tail -f", "follow what happens"),
            ("cloister audit query --run last --kind file", "files of the newest run"),
            ("cloister audit query --decision blocked --since 1d", "what was refused since yesterday"),
            ("cloister audit query --path '*/.ssh/*' --limit 0", "all that touched keys"),
            ("cloister audit export --format ocsf --since 1d", "yesterday's events for a SIEM"),
            ("cloister audit query --kind detection --severity high", "what was detected"),
            ("cloister audit stats --by host --decision blocked", "which hosts are refused most"),
        ),
    )
    actions = verb.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Action)
    for name in ACTIONS:
        _module(name).describe(actions)
    return verb


def main(argv: list[str]) -> int:
    """Do one action.

    Raises:
        CloisterError: the log cannot be read, or an option is wrong.
    """
    options: argparse.Namespace = parser().read(argv)
    code: int = _module(options.action).main(options)
    return code


def _module(action: str) -> Any:
    return importlib.import_module(f"cloister.cli.audit_{action}")
