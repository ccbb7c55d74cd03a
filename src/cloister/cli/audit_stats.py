"""`cloister audit stats`: how many events there are, by what one asks."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter

from cloister.audit.kinds import kinds
from cloister.cli import audit_options, output
from cloister.cli.arguments import Parser
from cloister.host.audit_files import segments
from cloister.runs.audit_log import AuditLog

BYS = ("kind", "class", "run", "agent", "user", "severity", "decision", "host", "path", "rule")
_OVERVIEW = ("agent", "run", "kind", "severity", "decision", "rule")
_TOP = 10
_NS = 1_000_000_000


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the action."""
    parser = audit_options.action(actions, "stats", "count events")
    parser.add_argument("--by", choices=BYS, default="", help="count by this alone; else an overview")
    parser.add_argument("--top", metavar="N", type=int, default=_TOP, help=f"the N most frequent; 0 for all ({_TOP})")
    audit_options.add_conditions(parser)
    audit_options.add_log(parser)
    parser.add_argument(
        "--json", action="store_true",
        help="print JSON with the keys log, segments, bytes, first, last, events, and by (word, value, count)",
    )  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Count, and print.

    Raises:
        CloisterError: there is no log, it cannot be read, or an option is wrong.
    """
    question = audit_options.question_of(options)
    with audit_options.opened_log(options) as log:
        by = (options.by,) if options.by else _OVERVIEW
        total = sum(log.count(question, "kind").values())
        sums = {word: _counted(log.count(question, "kind" if word == "class" else word), word) for word in by}
        facts = _facts(log)
    if options.json:
        counts = {word: dict(_top(held, options.top)) for word, held in sums.items()}
        output.print_json({**facts, "events": total, "by": counts})
        return 0
    if not options.by:
        print(_head(facts, total))
    for word, held in sums.items():
        shown = _top(held, options.top)
        if shown and (options.by or [value for value, _ in shown] != [""]):
            rest = len(held) - len(shown)
            if not options.by:
                print()
            print(output.table((word.upper(), f"{'EVENTS':>12}", f"{'SHARE':>6}"), _rows(word, shown, total)))
            print(output.colour(f"and {rest:,} more (--top 0)", "dim") if rest else "", end="\n" if rest else "")
    return 0


def _counted(sums: Counter[str], word: str) -> Counter[str]:
    """Return sums by class, where that was asked for; as they are otherwise."""
    if word != "class":
        return sums
    found = Counter[str]()
    for name, count in sums.items():
        known = kinds().get(name)
        found[str(known.class_uid) if known else "unknown"] += count
    return found


def _top(sums: Counter[str], top: int) -> list[tuple[str, int]]:
    ordered = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    return ordered[:top] if top > 0 else ordered


def _rows(word: str, shown: list[tuple[str, int]], total: int) -> list[tuple[str, str, str]]:
    return [
        (_named(word, value), f"{count:>12,}", f"{count / max(total, 1):>6.1%}" + f"  {_bar(count, total)}")
        for value, count in shown
    ]


def _bar(count: int, total: int) -> str:
    return "█" * round(count / max(total, 1) * 30)


def _named(word: str, value: str) -> str:
    if word == "severity" and value in "12345":
        return audit_options.SEVERITIES[int(value) - 1]
    return value or "-"


def _facts(log: AuditLog) -> dict[str, object]:
    first, last = log.span()
    files = segments(log.directory)
    size = 0
    for segment in files:
        try:
            size += os.stat(segment.path).st_size
        except FileNotFoundError:
            continue
    return {
        "log": log.directory, "segments": len(files), "bytes": size,
        "first": first / _NS, "last": last / _NS,
    }  # fmt: skip


def _head(facts: dict[str, object], total: int) -> str:
    first, last = float(str(facts["first"])), float(str(facts["last"]))
    span = f"{output.moment(first)} to {output.moment(last)}, {output.ago(last, time.time())}" if last else ""
    kept = f"{output.size(int(str(facts['bytes'])))} in {facts['segments']} segments"
    return output.pairs((("log", str(facts["log"])), ("kept", kept), ("indexed", span), ("events", f"{total:,}")))
