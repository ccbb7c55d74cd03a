"""What was used, added up for `cloister usage`: the ledger, and what the journal has that is not in it yet.

Reads only, and asks no broker. The journal is read before the ledger: a row that moves meanwhile is then seen in the
ledger, so none is missed, and its id keeps it from being counted twice. Calls without an end yet are told apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing
from typing import Protocol

import msgspec

from cloister.errors import RetryError
from cloister.host.journal import read as read_journal
from cloister.host.ledger import DAY_S, By, Group, LedgerCorruptError, LedgerDownError
from cloister.llm.ledger import Row
from cloister.runs.books_rows import FINAL, decode, tokens

BYS: tuple[By, ...] = ("agent", "model", "day", "run", "provider", "user")


class Line(msgspec.Struct, kw_only=True):
    """What one key used."""

    key: str
    requests: int = 0
    refused: int = 0
    estimated: int = 0
    """Requests whose usage was estimated."""
    unpriced: int = 0
    """Requests that used tokens of a model without a price: what they cost is in no sum."""
    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    estimated_usd: float = 0.0
    """The part of the cost that rests on estimated usage."""
    last: float = 0.0
    """When the newest of the calls was made, in seconds since the epoch."""
    days: dict[int, float] = msgspec.field(default_factory=dict)
    """Dollars by day since the epoch, UTC."""

    def add(self, group: Group) -> None:
        """Add what was used on one day."""
        self.requests += group.requests
        self.refused += group.refused
        self.estimated += group.estimated
        self.unpriced += group.unpriced
        self.input_tokens += group.input_tokens
        self.cache_read_tokens += group.cache_read_tokens
        self.cache_write_tokens += group.cache_write_tokens
        self.output_tokens += group.output_tokens
        self.cost_usd += group.cost_usd
        self.estimated_usd += group.estimated_usd
        self.last = max(self.last, group.last)
        self.days[group.day] = self.days.get(group.day, 0.0) + group.cost_usd

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.input_tokens + self.cache_read_tokens + self.cache_write_tokens + self.output_tokens


class Usage(msgspec.Struct, kw_only=True, frozen=True):
    """The answer."""

    by: By
    since: float
    until: float
    lines: list[Line]
    """The dearest first; by day, the oldest first."""
    total: Line
    under_way: int
    """Calls without an end yet; in no sum."""
    under_way_usd: float
    """At most what those will cost."""


class Question(msgspec.Struct, kw_only=True, frozen=True):
    """What is asked."""

    by: By = "agent"
    since: float = 0.0
    until: float = float("inf")
    agent: str = ""


class Readable(Protocol):
    """A ledger that can be read."""

    def groups(self, by: By, since: float, until: float, agent: str = "") -> list[Group]:
        """Return what was used, per key and day."""
        ...

    def known(self, ids: Iterable[str]) -> set[str]:
        """Return which ids have a row."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def sqlite_ledger(path: str) -> Readable | None:
    """Return the SQLite ledger for reading, or None when there is none yet.

    Raises:
        RetryError: it is there and cannot be read.
    """
    from cloister.host.ledger_sqlite import SqliteLedger

    if not os.path.lexists(path):
        return None
    try:
        return SqliteLedger(path, read_only=True)
    except (LedgerDownError, LedgerCorruptError) as error:
        raise _unreadable(path, error) from error


def postgres_ledger(address: str) -> Readable:
    """Return the ledger in PostgreSQL.

    Raises:
        RetryError: it cannot be reached.
    """
    from cloister.host.ledger_postgres import PostgresPlace

    try:
        return PostgresPlace(lambda: address).open()
    except LedgerDownError as error:
        raise _unreadable("in PostgreSQL", error) from error


def gather(journal: str, ledger: Readable | None, question: Question) -> Usage:
    """Add up what was used. The ledger is closed.

    Args:
        journal: the directory of the books.
        ledger: an open ledger, or None where there is none yet.
        question: what is asked.

    Raises:
        RetryError: the ledger cannot be read.
    """
    opened, final = _on_their_way(journal, question)
    lines: dict[str, Line] = {}
    total = Line(key="")
    groups: list[Group] = []
    if ledger is not None:
        with closing(ledger):
            try:
                groups = ledger.groups(question.by, question.since, question.until, question.agent)
                known = ledger.known([*final, *opened])
            except (LedgerDownError, LedgerCorruptError) as error:
                raise _unreadable("the ledger", error) from error
        final = {one: row for one, row in final.items() if one not in known}
        opened = {one: row for one, row in opened.items() if one not in known}
    for group in (*groups, *(_group(row, question.by) for row in final.values())):
        key = _day(int(group.key)) if question.by == "day" else group.key
        lines.setdefault(key, Line(key=key)).add(group)
        total.add(group)
    order = sorted(lines.values(), key=lambda line: line.key if question.by == "day" else (-line.cost_usd, line.key))
    return Usage(
        by=question.by,
        since=question.since,
        until=question.until,
        lines=order,
        total=total,
        under_way=len(opened),
        under_way_usd=sum(row.cost_usd for row in opened.values()),
    )


def _on_their_way(journal: str, question: Question) -> tuple[dict[str, Row], dict[str, Row]]:
    """Return calls without an end, and rows, that the journal has within what is asked."""
    opened: dict[str, Row] = {}
    final: dict[str, Row] = {}
    for record in read_journal(journal).records:
        row = decode(record.payload)
        if row is None:
            continue
        (final if record.kind == FINAL else opened)[row.id] = row

    def asked(row: Row) -> bool:
        return question.since <= row.time < question.until and question.agent in {"", row.agent}

    return (
        {one: row for one, row in opened.items() if one not in final and asked(row)},
        {one: row for one, row in final.items() if asked(row)},
    )


def _group(row: Row, by: By) -> Group:
    refused = row.outcome == "refused"
    estimated = row.source == "estimated" and not refused
    day = int(row.time // DAY_S)
    return Group(
        str(day) if by == "day" else str(getattr(row, by)),
        day,
        int(not refused),
        int(refused),
        int(estimated),
        int(not row.price and tokens(row) > 0),
        row.input_tokens,
        row.cache_read_tokens,
        row.cache_write_5m_tokens + row.cache_write_1h_tokens,
        row.output_tokens,
        row.cost_usd,
        row.cost_usd if estimated else 0.0,
        row.time,
    )


def _day(number: int) -> str:
    import datetime as dt

    return dt.datetime.fromtimestamp(number * DAY_S, tz=dt.UTC).strftime("%Y-%m-%d")


def _unreadable(where: str, error: Exception) -> RetryError:
    return RetryError(
        "ledger-unreachable",
        f"the ledger cannot be read: {error}",
        where=where,
        remedy="cloister usage, a little later",
    )
