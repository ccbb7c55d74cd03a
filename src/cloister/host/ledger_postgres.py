"""The ledger in PostgreSQL, by psycopg 3: the same table as in SQLite, for rows of several brokers and hosts.

The address comes anew from its reference with every connection, so that a password can change; it is in no message
and no repr. Waits are bounded, because the books ask here for what was spent: 3 seconds to connect, 5 for a
statement.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from cloister.errors import CloisterError, UnsupportedError
from cloister.host.ledger import (
    SCHEMA,
    By,
    Group,
    LedgerDownError,
    Question,
    Sum,
    Values,
    create_table,
    group_query,
    prune_query,
    refuse_newer,
    sum_query,
    upsert,
)

CONNECT_S = 3
STATEMENT_MS = 5000
_T = TypeVar("_T")
_LOCK = 0x636C6F69
"""Two brokers that make the table at the same time wait for each other (pg_advisory_xact_lock)."""


class PostgresPlace:
    """An address for the ledger."""

    name = "in PostgreSQL"
    is_file = False

    def __init__(self, address: Callable[[], str]) -> None:
        """Take the way to the address.

        Raises:
            UnsupportedError: the driver is not installed.
        """
        try:
            import psycopg as _  # noqa: F401  # asked now, so that a start is refused and not the first call
        except ImportError as error:
            raise UnsupportedError(
                "postgresql-missing",
                "the ledger is in PostgreSQL, and its driver is not installed",
                where=".ledger.database",
                remedy="pip install 'cloister[postgresql]'",
            ) from error
        self._address = address

    def open(self) -> PostgresLedger:
        """See `Place.open`."""
        try:
            address = self._address()
        except CloisterError as error:
            raise LedgerDownError(f"its address cannot be had: {error.message}") from error
        return PostgresLedger(address)

    def is_broken(self) -> bool:
        """See `Place.is_broken`: that is for the server to know."""
        return False

    def set_aside(self) -> str:
        """Nothing of it is ours to rename: `LedgerCorruptError` is not raised here."""
        return self.name


class PostgresLedger:
    """One connection."""

    def __init__(self, address: str) -> None:
        """Connect, and make the table where there is none.

        Raises:
            LedgerDownError: it cannot be reached, or refuses us.
            UnsupportedError: a newer version of Cloister wrote it.
        """
        import psycopg

        self._errors = psycopg.Error
        self._connection = self._shielded(
            lambda: psycopg.connect(
                address,
                connect_timeout=CONNECT_S,
                application_name="cloister",
                options=f"-c statement_timeout={STATEMENT_MS} -c lock_timeout={STATEMENT_MS}",
                autocommit=True,
            )
        )
        try:
            self._shielded(self._prepare)
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        connection = self._connection
        if (encoding := connection.info.parameter_status("server_encoding")) != "UTF8":
            # A name that it cannot hold would stop every row behind it.
            raise LedgerDownError(f"its encoding is {encoding}, and must be UTF8")
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            connection.execute("SET LOCAL client_min_messages = warning")
            connection.execute("CREATE TABLE IF NOT EXISTS cloister_ledger (version BIGINT NOT NULL)")
            row = connection.execute("SELECT max(version) FROM cloister_ledger").fetchone()
            version = row[0] if row and row[0] is not None else 0
            refuse_newer(version, ".ledger.database")
            if version == 0:
                for statement in create_table():
                    connection.execute(statement.encode())
                connection.execute("INSERT INTO cloister_ledger (version) VALUES (%s)", (SCHEMA,))

    def write(self, final: Sequence[Values], noted: Sequence[Values]) -> None:
        """See `Ledger.write`."""

        def work() -> None:
            with self._connection.transaction(), self._connection.cursor() as cursor:
                if final:
                    cursor.executemany(_REPLACE, final)
                if noted:
                    cursor.executemany(_KEEP, noted)

        self._shielded(work)

    def spent(self, question: Question, ids: Iterable[str]) -> tuple[Sum, set[str]]:
        """See `Ledger.spent`."""

        def work() -> tuple[Sum, set[str]]:
            connection = self._connection
            with connection.transaction():
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
                row = connection.execute(sum_query("%s", question).encode(), question.arguments()).fetchone()
                found = connection.execute("SELECT id FROM calls WHERE id = ANY(%s)", (list(ids),))
                known = {one for (one,) in found}
            requests, tokens, cost = row or (0, 0, 0.0)
            return Sum(int(requests), int(tokens), float(cost)), known

        return self._shielded(work)

    def known(self, ids: Iterable[str]) -> set[str]:
        """Return which ids have a row."""
        asked = list(ids)
        query = "SELECT id FROM calls WHERE id = ANY(%s)"
        return self._shielded(lambda: {one for (one,) in self._connection.execute(query, (asked,))})

    def groups(self, by: By, since: float, until: float, agent: str = "") -> list[Group]:
        """Return what was used, per key and day."""
        arguments = (since, until, *([agent] if agent else []))
        query = group_query("%s", by, agent=bool(agent)).encode()

        def work() -> list[Group]:
            found = self._connection.execute(query, arguments)
            # Sums of integers are numeric in PostgreSQL.
            return [Group(str(key), *map(int, rest[:9]), *map(float, rest[9:])) for key, *rest in found]

        return self._shielded(work)

    def prune(self, before: float) -> int:
        """See `Ledger.prune`."""
        return self._shielded(lambda: self._connection.execute(_PRUNE, (before,)).rowcount)

    def size(self) -> int:
        """Return the bytes of the table with its indexes."""
        query = "SELECT pg_total_relation_size('calls')"
        row = self._shielded(lambda: self._connection.execute(query).fetchone())
        return int(row[0]) if row else 0

    def newest(self) -> float:
        """See `Ledger.newest`."""
        row = self._shielded(lambda: self._connection.execute('SELECT max("time") FROM calls').fetchone())
        return float(row[0]) if row and row[0] is not None else 0.0

    def close(self) -> None:
        """Close."""
        with contextlib.suppress(self._errors), warnings.catch_warnings():
            self._connection.close()

    def _shielded(self, work: Callable[[], _T]) -> _T:
        try:
            return work()
        except self._errors as error:
            # The driver names server and user, never the password.
            text = str(error).strip().partition("\n")[0] or type(error).__name__
            raise LedgerDownError(text) from error


_REPLACE = upsert("%s", replace=True).encode()
_KEEP = upsert("%s", replace=False).encode()
_PRUNE = prune_query("%s").encode()
