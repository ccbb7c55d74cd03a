"""What a ledger is to those who keep books: the columns of a row, sums over rows, and how a database may fail.

The two kinds are `ledger_sqlite` and `ledger_postgres`; both have the same table. A row is a tuple in the order of
`COLUMNS`, whose names are those of `llm.ledger.Row` and, last, the sum of its tokens. This room does not know what a
row means; turning one into the other is for `runs/books.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from cloister.errors import UnsupportedError

SCHEMA = 1
"""The version of the table. A newer one is refused: an old program must not write into what it does not understand."""

COLUMNS: tuple[tuple[str, str], ...] = (
    ("id", "TEXT"),
    ("time", "DOUBLE PRECISION"),
    ("run", "TEXT"),
    ("agent", "TEXT"),
    ("user", "TEXT"),
    ("provider", "TEXT"),
    ("route", "TEXT"),
    ("model", "TEXT"),
    ("input_tokens", "BIGINT"),
    ("cache_read_tokens", "BIGINT"),
    ("cache_write_5m_tokens", "BIGINT"),
    ("cache_write_1h_tokens", "BIGINT"),
    ("output_tokens", "BIGINT"),
    ("reasoning_tokens", "BIGINT"),
    ("cost_usd", "DOUBLE PRECISION"),
    ("price", "TEXT"),
    ("source", "TEXT"),
    ("status", "BIGINT"),
    ("outcome", "TEXT"),
    ("reason", "TEXT"),
    ("stream", "BOOLEAN"),
    ("attempts", "BIGINT"),
    ("first_byte_s", "DOUBLE PRECISION"),
    ("duration_s", "DOUBLE PRECISION"),
    ("request_id", "TEXT"),
    ("tokens", "BIGINT"),
)
NAMES = tuple(name for name, _ in COLUMNS)
INDEXES = (
    ("calls_time", '"time"', ""),
    # Covering: the sum of an agent's month, or of a run, is read from the index alone, in the order of time.
    ("calls_spent", 'agent, "time", "user", tokens, cost_usd', "WHERE outcome <> 'refused'"),
    ("calls_run", 'run, agent, "time", "user", tokens, cost_usd', "WHERE outcome <> 'refused'"),
)

PRUNED = 5000
"""Rows deleted at a time: nobody who reads or writes waits long for it."""

By = Literal["agent", "model", "day", "run", "provider", "user"]
DAY_S = 86400

Values = tuple[Any, ...]


class Sum(NamedTuple):
    """Requests that were not refused, all their tokens, and dollars."""

    requests: int
    tokens: int
    cost_usd: float


class Question(NamedTuple):
    """Whose calls, and of what time: `since` <= time < `until`; of one run or user where these are not empty."""

    agent: str
    since: float
    until: float
    run: str = ""
    user: str = ""

    def arguments(self) -> tuple[str | float, ...]:
        """Return the arguments of `sum_query`."""
        last = tuple(one for one in (self.run, self.user) if one)
        return (self.agent, self.since, self.until, *last)


class Group(NamedTuple):
    """All calls of one day, UTC, that share a key: what `cloister usage` adds up."""

    key: str
    day: int
    """Days since the epoch."""
    requests: int
    refused: int
    estimated: int
    unpriced: int
    input_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    output_tokens: int
    cost_usd: float
    estimated_usd: float
    """The part of `cost_usd` that rests on estimated usage."""
    last: float


class LedgerDownError(Exception):
    """The database cannot be reached or written now; rows wait."""


class LedgerCorruptError(Exception):
    """What is there is no database of ours, or a broken one."""


class LedgerGoneError(LedgerCorruptError):
    """The file that was opened is not there any more, or another one has its name."""


class Place(Protocol):
    """Where a ledger is. `open` may be called in any thread."""

    @property
    def name(self) -> str:
        """Return what a person calls it; without a password."""
        ...

    @property
    def is_file(self) -> bool:
        """Return whether it is opened in no time, and must be while there is space on the disk."""
        ...

    def open(self) -> Ledger:
        """Return a connection of its own, and make the ledger where there is none.

        Raises:
            LedgerDownError: it cannot be reached now.
            LedgerCorruptError: it is broken.
        """
        ...

    def is_broken(self) -> bool:
        """Return whether what is there now is broken, by looking at all of it."""
        ...

    def set_aside(self) -> str:
        """Give what is broken another name, and return that."""
        ...


class Ledger(Protocol):
    """A database of rows. Used by one thread."""

    def write(self, final: Sequence[Values], noted: Sequence[Values]) -> None:
        """Write rows in one transaction that is on the disk when this returns.

        Args:
            final: rows that take the place of one with the same id.
            noted: rows of calls whose end nobody saw; what is there already stays.

        Raises:
            LedgerDownError: nothing was written.
            LedgerCorruptError: nothing was written, and never will be.
        """
        ...

    def spent(self, question: Question, ids: Iterable[str]) -> tuple[Sum, set[str]]:
        """Return a sum, and which of `ids` are in it or elsewhere in the ledger, both as of one moment."""
        ...

    def prune(self, before: float) -> int:
        """Delete some of the rows older than a time, the oldest first, and return how many: none when none is left."""
        ...

    def newest(self) -> float:
        """Return the time of the newest row, 0 where there is none."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def refuse_newer(version: int, where: str) -> None:
    """Refuse a ledger that a newer program made.

    Raises:
        UnsupportedError: it is newer.
    """
    if version > SCHEMA:
        raise UnsupportedError(
            "ledger-newer",
            f"the ledger has version {version}, this program knows {SCHEMA}",
            where=where,
            remedy="install the newer Cloister again",
        )


def create_table() -> list[str]:
    """Return the statements that make an empty ledger, in SQL that both databases understand."""
    columns = ", ".join(f'"{name}" {kind} NOT NULL' for name, kind in COLUMNS[1:])
    return [
        f'CREATE TABLE IF NOT EXISTS calls ("id" TEXT PRIMARY KEY NOT NULL, {columns})',
        *(f"CREATE INDEX IF NOT EXISTS {name} ON calls ({what}) {where}".strip() for name, what, where in INDEXES),
    ]


def upsert(mark: str, *, replace: bool) -> str:
    """Return the statement that writes a row; `mark` is the driver's placeholder."""
    names = ", ".join(f'"{name}"' for name in NAMES)
    marks = ", ".join([mark] * len(NAMES))
    sets = ", ".join(f'"{name}" = excluded."{name}"' for name in NAMES[1:])
    action = f"UPDATE SET {sets}" if replace else "NOTHING"
    return f'INSERT INTO calls ({names}) VALUES ({marks}) ON CONFLICT ("id") DO {action}'  # noqa: S608  # our own names


def prune_query(mark: str) -> str:
    """Return the statement of `Ledger.prune`; its argument is the time."""
    oldest = f'SELECT "id" FROM calls WHERE "time" < {mark} ORDER BY "time" LIMIT {PRUNED}'  # noqa: S608  # our own names
    return f'DELETE FROM calls WHERE "id" IN ({oldest})'  # noqa: S608  # our own names


def sum_query(mark: str, question: Question) -> str:
    """Return the query of `Ledger.spent`; `Question.arguments` gives its arguments."""
    more = (f" AND run = {mark}" if question.run else "") + (f' AND "user" = {mark}' if question.user else "")
    return (
        "SELECT count(*), coalesce(sum(tokens), 0), coalesce(sum(cost_usd), 0.0) FROM calls "  # noqa: S608  # our own names
        f'WHERE outcome <> \'refused\' AND agent = {mark} AND "time" >= {mark} AND "time" < {mark}{more}'
    )


def group_query(mark: str, by: By, *, agent: bool) -> str:
    """Return the query behind `cloister usage`: one `Group` per key and day; its arguments are since, until, agent."""
    day = f'CAST(floor("time" / {DAY_S}) AS BIGINT)'
    key = f"CAST({day} AS TEXT)" if by == "day" else f'"{by}"'
    estimated = "CASE WHEN source = 'estimated' AND outcome <> 'refused' THEN {} ELSE 0 END"
    return (
        f"SELECT {key}, {day}, "  # noqa: S608  # our own names
        "sum(CASE WHEN outcome = 'refused' THEN 0 ELSE 1 END), sum(CASE WHEN outcome = 'refused' THEN 1 ELSE 0 END), "
        f"sum({estimated.format(1)}), sum(CASE WHEN price = '' AND tokens > 0 THEN 1 ELSE 0 END), "
        "sum(input_tokens), sum(cache_read_tokens), sum(cache_write_5m_tokens + cache_write_1h_tokens), "
        f'sum(output_tokens), sum(cost_usd), sum({estimated.format("cost_usd")}), max("time") FROM calls '
        f'WHERE "time" >= {mark} AND "time" < {mark}' + (f" AND agent = {mark}" if agent else "") + " GROUP BY 1, 2"
    )
