"""`cloister usage`: what model calls used and cost. What is added up is decided in `runs/usage.py`."""

from __future__ import annotations

import csv
import datetime as dt
import os
import shutil
import sys
import time
from typing import NamedTuple

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.cli.moments import DAY_S, moment
from cloister.errors import DeniedError, PolicyError
from cloister.plan.unit import HOSTD_SOCKET
from cloister.policy.model import Ledger
from cloister.runs import books_open, usage
from cloister.runs.paths import SYSTEM_POLICY, Paths
from cloister.runs.policies import PolicyFiles
from cloister.runs.usage import Line, Question, Usage

DEFAULT_SINCE = "30d"
_BARS = "▁▂▃▄▅▆▇█"
_SPARK = (6, 31)
"""Fewest and most cells of a sparkline."""
_KEY = 10
"""The key is cut to no less than this."""
_NUMBERS = ("CALLS", "INPUT", "CACHED", "WRITTEN", "OUTPUT", "COST")
_SPARE = ("WRITTEN", "CACHED", "CALLS")
"""Columns left out where a terminal is narrow, in this order."""
_THOUSAND = 1000
_CENT = 0.01
_FIELDS = (
    "requests",
    "refused",
    "estimated",
    "unpriced",
    "input_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "output_tokens",
    "cost_usd",
    "estimated_usd",
)


class Table(NamedTuple):
    """Texts of a table: heads, rows, the total, and the sparklines beside the rows."""

    heads: list[str]
    rows: list[list[str]]
    total: list[str]
    sparks: list[str]
    over: str
    """The head above the sparklines."""


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "usage",
        "Show what model calls used and cost.",
        prose=(
            "Costs are tokens times the price list, or what the upstream says it charges. ~ marks sums in which "
            "some usage was estimated: the stream broke, or the upstream did not tell. Days are those of UTC, as "
            "in budgets. CACHED are tokens read from a prompt cache, WRITTEN those written to one; INPUT are all "
            "others. The ledger is read without the broker. Refused calls cost nothing and are counted apart. "
            "Sums that lack calls of models without a price are marked as at least so much. Own prices go into "
            "~/.config/cloister/prices.toml: schema = 1, then tables [[price]] with models = [...], input and "
            "output in dollars per million tokens, and where they differ cache_read, cache_write and "
            "cache_write_1h; providers = [...] binds a table to some providers."
        ),
        examples=(
            ("cloister usage", "the last 30 days, by agent"),
            ("cloister usage --by model --since today", "which models, since midnight UTC"),
            ("cloister usage --by day --agent claude", "one agent, day by day"),
            ("cloister usage --since 2026-11-01 --csv", "for a spreadsheet"),
            ("sudo cloister usage --system --by user", "agents under systemd, by who started them"),
        ),
    )
    verb.add_argument("--by", choices=usage.BYS, default="agent", help="what to add up by (default: agent)")
    verb.add_argument(
        "--since", metavar="WHEN", type=moment, default=DEFAULT_SINCE,
        help="from then on: 7d, 12h, a date, `today`, `month` or `all` (default: 30d)",
    )  # fmt: skip
    verb.add_argument("--until", metavar="WHEN", type=moment, default="now", help="before then (default: now)")
    verb.add_argument("--agent", default="", help="only this agent")
    verb.add_argument(
        "--system", action="store_true",
        help="calls of the system's agents and gateways, of all users (root; with --by user, by user)",
    )  # fmt: skip
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print comma-separated values, RFC 4180")
    form.add_argument(
        "--json", action="store_true",
        help="print JSON with the keys by, since, until, lines, total, under_way, under_way_usd",
    )  # fmt: skip
    return verb


def main(argv: list[str]) -> int:
    """Print what was used.

    Raises:
        PolicyError: the policy, which says where the ledger is, is wrong.
        RetryError: the ledger cannot be read now.
    """
    options = parser().read(argv)
    found = _gather(
        Question(by=options.by, since=options.since, until=options.until, agent=options.agent), system=options.system
    )
    if options.json:
        output.print_json(_plain(found))
    elif options.csv:
        _print_csv(found)
    elif not found.lines and not found.under_way:
        print("no model calls; `cloister usage --since all` looks further back" if options.since else "no model calls")
        if not options.system and os.path.exists(HOSTD_SOCKET):
            print("agents under systemd: `cloister receipt RUN`, and for root `cloister usage --system`")
    else:
        print(render(found, shutil.get_terminal_size().columns if output.is_terminal() else 0))
    return 0


def render(found: Usage, width: int) -> str:
    """Return the table and what is to be said about it.

    Args:
        found: the answer.
        width: columns of the terminal; 0 for no limit.
    """
    first, last = _span(found)
    table = _table(found, first, last)
    text = _fit(table, width)
    return "\n".join([*text, "", *(output.colour(note, "dim") for note in _notes(found, first, last))])


def _table(found: Usage, first: int, last: int) -> Table:
    days = last - first + 1
    size = max(_SPARK[0], min(_SPARK[1], days))
    with_sparks = found.by != "day" and days > 1 and any(line.cost_usd for line in found.lines)
    top = max((line.cost_usd for line in found.lines), default=0.0) if found.by == "day" else 0.0
    if found.by == "day":
        sparks = [_bar(line.cost_usd, top) for line in found.lines]
    else:
        sparks = [spark(line.days, first, last, size) for line in found.lines]
    heads = [found.by.upper(), *_NUMBERS]
    rows = [[output.clean(line.key) or "-", *_numbers(line)] for line in found.lines]
    shown = sparks if with_sparks or (found.by == "day" and top) else []
    over = "" if found.by == "day" else "PER DAY" if days <= size else "OVER TIME"
    return Table(heads, rows, ["total", *_numbers(found.total)], shown, over)


def _fit(table: Table, width: int) -> list[str]:
    """Return the lines of a table that is not wider than the terminal: columns go before digits do."""
    heads, sparks = list(table.heads), table.sparks
    rows = [list(row) for row in [*table.rows, table.total]]

    def widths() -> list[int]:
        return [max(output.cells(row[place]) for row in [heads, *rows]) for place in range(len(heads))]

    def total() -> int:
        sizes = widths()
        beside = 2 + max(map(len, sparks)) if sparks else 0
        return min(sizes[0], max(_KEY, sizes[0])) + sum(size + 2 for size in sizes[1:]) + beside

    spare = list(_SPARE)
    while width and total() > width:
        over = total() - width
        if widths()[0] - over >= 2 * _KEY:
            break
        if sparks:
            sparks = []
        elif spare:
            place = heads.index(spare.pop(0))
            for row in [heads, *rows]:
                del row[place]
        else:
            break
    sizes = widths()
    if width and total() > width:
        sizes[0] = max(_KEY, sizes[0] - (total() - width))
    lines = [output.colour((_line(heads, sizes) + (f"  {table.over}" if sparks else "")).rstrip(), "dim")]
    for number, row in enumerate(rows[:-1]):
        lines.append(_line(row, sizes) + (f"  {output.colour(sparks[number], 'green')}" if sparks else ""))
    return [*(line.rstrip() for line in lines), output.colour(_line(rows[-1], sizes), "bold")]


def _line(row: list[str], sizes: list[int]) -> str:
    key = output.cut(row[0], sizes[0])
    text = key + " " * (sizes[0] - output.cells(key))
    return text + "".join(f"  {cell:>{size}}" for cell, size in zip(row[1:], sizes[1:], strict=True))


def _numbers(line: Line) -> list[str]:
    return [
        f"{line.requests:,}",
        count(line.input_tokens),
        count(line.cache_read_tokens),
        count(line.cache_write_tokens),
        count(line.output_tokens),
        ("≥" if line.unpriced else "~" if line.estimated else "") + dollars(line.cost_usd),
    ]


def count(number: int) -> str:
    """Return a number of tokens in three or four digits: `812`, `45.3k`, `1.2M`."""
    amount = float(number)
    for unit in ("", "k", "M", "G"):
        if amount < _THOUSAND - (0.5 if unit == "" else 0.05) or unit == "G":
            break
        amount /= _THOUSAND
    return str(number) if unit == "" else f"{amount:,.1f}{unit}"


def dollars(amount: float) -> str:
    """Return an amount in dollars and cents, and what is less than a cent with the digits that matter."""
    if 0 < amount < _CENT:
        return f"${amount:.4f}" if amount >= _CENT**2 else "<$0.0001"
    return f"${amount:,.2f}"


def spark(days: dict[int, float], first: int, last: int, size: int) -> str:
    """Return a line of bars, one per day or per several, from nothing to the line's own highest."""
    span = last - first + 1
    sums = [0.0] * min(size, span)
    for day, amount in days.items():
        if first <= day <= last:
            sums[(day - first) * len(sums) // span] += amount
    top = max(sums, default=0.0)
    if not top:
        return " " * len(sums)
    return "".join(" " if not one else _BARS[min(len(_BARS) - 1, int(one / top * len(_BARS)))] for one in sums)


def _bar(amount: float, top: float) -> str:
    """Return a bar for one day, as long as its part of the dearest day."""
    return "█" * round(amount / top * 24) if top else ""


def _notes(found: Usage, first: int, last: int) -> list[str]:
    total = found.total
    notes = [f"{_date(first)} to {_date(last)}, UTC"] if total.requests or total.refused else []
    if total.estimated:
        calls = "call has" if total.estimated == 1 else "calls have"
        notes.append(f"~ {total.estimated:,} {calls} estimated usage: {dollars(total.estimated_usd)} of the cost")
    if total.unpriced:
        calls = "call is" if total.unpriced == 1 else "calls are"
        notes.append(f"≥ {total.unpriced:,} {calls} in no cost: no price is known for the model (prices.toml)")
    if total.refused:
        notes.append(f"{total.refused:,} more {'was' if total.refused == 1 else 'were'} refused")
    if found.under_way:
        calls = "call has" if found.under_way == 1 else "calls have"
        notes.append(f"{found.under_way:,} {calls} no end yet, at most {dollars(found.under_way_usd)}, in no sum")
    return notes


def _span(found: Usage) -> tuple[int, int]:
    """Return the first and last day that is shown: those asked for, but none before the first call."""
    days = [day for line in found.lines for day in line.days]
    last = int(min(found.until, time.time()) // DAY_S)
    first = max(min(days, default=last), int(found.since // DAY_S))
    return first, max(last, max(days, default=last))


def _date(day: int) -> str:
    return dt.datetime.fromtimestamp(day * DAY_S, tz=dt.UTC).strftime("%Y-%m-%d")


def _plain(found: Usage) -> dict[str, object]:
    """Return the answer for programs."""
    return {
        "by": found.by,
        "since": found.since,
        "until": found.until,
        "lines": [{"key": line.key, **_fields(line)} for line in found.lines],
        "total": _fields(found.total),
        "under_way": found.under_way,
        "under_way_usd": found.under_way_usd,
    }


def _fields(line: Line) -> dict[str, object]:
    days = {_date(day): amount for day, amount in sorted(line.days.items())}
    return {**{name: getattr(line, name) for name in _FIELDS}, "last": line.last, "days_usd": days}


def _print_csv(found: Usage) -> None:
    writer = csv.writer(sys.stdout)
    writer.writerow([found.by, *_FIELDS])
    for line in found.lines:
        key = output.clean(line.key)
        if key[:1] in {"=", "+", "-", "@"}:
            key = f"'{key}"  # names are chosen by agents, and spreadsheets run what begins so
        writer.writerow([key, *(getattr(line, name) for name in _FIELDS)])


def of_run(run: str, agent: str, started: float, finished: float) -> str:
    """Return in one line what the calls of a run used, for its receipt.

    Raises:
        CloisterError: the policy is wrong, or the ledger cannot be read now.
    """
    found = _gather(Question(by="run", since=started - 1, until=finished + 1, agent=agent))
    line = next((line for line in found.lines if line.key == run), Line(key=run))
    given = line.input_tokens + line.cache_read_tokens + line.cache_write_tokens
    sign = "≥" if line.unpriced else "~" if line.estimated else ""
    calls = f"{line.requests:,} call{'' if line.requests == 1 else 's'}, {line.refused:,} refused"
    return f"{calls}, {count(given)} tokens in, {count(line.output_tokens)} out, {sign}{dollars(line.cost_usd)}"


def _gather(question: Question, *, system: bool = False) -> Usage:
    if system and os.geteuid() != 0:
        raise DeniedError(
            "root-needed", "the system's ledger has the calls of all its users, so only root reads it",
            remedy="sudo cloister usage --system; what your own runs used is in `cloister receipt RUN`",
        )  # fmt: skip
    places = _system_places() if system else records.places()
    try:
        settings = PolicyFiles(places, os.getuid(), system="" if system else SYSTEM_POLICY).ledger()
    except PolicyError as error:
        if error.reference != "policy-missing":
            raise
        settings = Ledger()
    directory = books_open.directory(places.state)
    if settings.database:
        address = books_open.address_of(settings.database, places.home, os.getuid(), os.environ)
        return usage.gather(directory, usage.postgres_ledger(address()), question)
    return usage.gather(directory, usage.sqlite_ledger(f"{directory}/ledger.db"), question)


def _system_places() -> Paths:
    from cloister.runs.unit_prepare import system_paths  # what the system's broker has: much, for other verbs' start

    return system_paths()
