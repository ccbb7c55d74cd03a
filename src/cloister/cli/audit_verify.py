"""`cloister audit verify`: is a log what its keeper wrote? From its files and public key alone, on any machine."""

from __future__ import annotations

import argparse
import re

from cloister.audit.verify import Report
from cloister.cli import audit_options, output
from cloister.cli.arguments import Parser
from cloister.errors import UsageError
from cloister.runs.audit_verify import verify

_DAMAGED = 1
_SHOWN = 20


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the action."""
    parser = audit_options.action(actions, "verify", "find out whether the log was changed")
    parser.add_argument("directory", nargs="?", default="", metavar="DIRECTORY", help="a log, or a copy of one")
    parser.add_argument("--key", default="", metavar="FILE", help="trust these public keys (PEM), not those beside it")
    parser.add_argument(
        "--head", action="append", default=[], metavar="SEQ:HASH",
        help="a head that was noted elsewhere must be there; may be given several times",
    )  # fmt: skip
    audit_options.add_log(parser)
    parser.add_argument(
        "--json", action="store_true",
        help="print JSON with the keys good, log, first, last, lines, segments, heads, signed_to, tip, retired_to, "
        "ending, torn_bytes, keys, pinned, damage, findings (kind, segment, line, seq, message), notes",
    )  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Verify, say what is wrong and where; return 0 for a log without damage, else 1.

    Raises:
        CloisterError: there is no log or no key, or an option is wrong.
    """
    directory = options.directory or audit_options.directory_of(options)
    report = verify(directory, options.key, _noted(options.head))
    if options.json:
        fields = {name: getattr(report, name) for name in report.__struct_fields__}
        fields["findings"] = [finding._asdict() for finding in report.findings]
        output.print_json({"good": report.good, **fields})
    else:
        print(_text(directory, report))
    return 0 if report.good else _DAMAGED


def _noted(words: list[str]) -> dict[int, str]:
    """Return heads by number.

    Raises:
        UsageError: one is none.
    """
    noted: dict[int, str] = {}
    for word in words:
        found = re.fullmatch(r"([1-9][0-9]*):([0-9a-f]{64})", word)
        if found is None:
            remedy = "--head SEQ:HASH, as `verify` prints it (tip)"
            raise UsageError("audit-head", f"{word!r} is no head", remedy=remedy)
        noted[int(found[1])] = found[2]
    return noted


def _text(directory: str, report: Report) -> str:
    lines = [
        f"log      {report.log} in {directory}",
        f"lines    {report.first} to {report.last} in {report.segments} segments, {report.heads} heads",
        f"signed   to line {report.signed_to}{_after(report)}",
        f"end      {_ENDS[report.ending]}",
        f"keys     {', '.join(report.keys) or 'none'}{'' if report.pinned else _BESIDE}",
        f"tip      {report.tip or 'none'}",
    ]
    if report.retired_to:
        lines.append(f"retired  lines to {report.retired_to}, by the log's own retention, which is signed")
    lines += [f"note     {note}" for note in report.notes[:_SHOWN]]
    lines += [
        f"DAMAGE   {one.kind}: {one.segment}, line {one.line} (seq {one.seq}): {one.message}"
        for one in report.findings[:_SHOWN]
    ]
    if report.damage > _SHOWN:
        lines.append(f"         and {report.damage - min(_SHOWN, len(report.findings))} more")
    lines.append("this log is what its keeper wrote" if report.good else "this log was DAMAGED or CHANGED")
    return "\n".join(map(output.clean, lines))


def _after(report: Report) -> str:
    left = report.last - report.signed_to
    return f"; the {left} after it bear no signature yet" if left > 0 else ""


_ENDS = {
    "closed": "closed in order",
    "open": "open: its keeper lives, or was killed",
    "torn": "half a line: the keeper was killed, or the power was cut",
}
_BESIDE = " (found beside the log; pin one with --key)"
