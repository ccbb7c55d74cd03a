"""The ledger in one SQLite file, by apsw: a current SQLite, because those before 3.51.3 lose data under WAL.

WAL, so that `cloister usage` reads while calls are written. `synchronous = FULL`: a committed row is on the disk, and
only then does the journal let go of it; the writer is a thread with batches, so that the wait costs no call anything.
Never mmap: a file that shrinks under it would kill the broker by SIGBUS.
"""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import apsw

from cloister.host.ledger import (
    COLUMNS,
    NAMES,
    SCHEMA,
    By,
    Group,
    LedgerCorruptError,
    LedgerDownError,
    LedgerGoneError,
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

BUSY_MS = 5000
_IDS = 500
_T = TypeVar("_T")


class SqliteLedger:
    """One connection to one file."""

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        """Open, and make the table where there is none and it may.

        Raises:
            LedgerDownError: it cannot be opened now, or is not there to be read.
            LedgerCorruptError: it is not a database, or a broken one.
            UnsupportedError: a newer version of Cloister wrote it.
        """
        self.path = path
        self._read_only = read_only
        try:
            self._connection = _shielded(lambda: self._open(read_only=read_only))
        except LedgerDownError as error:
            if isinstance(error.__cause__, apsw.SQLError):  # no such table or column: a database, and not ours
                raise LedgerCorruptError(str(error)) from error
            raise
        self._inode = _inode(path)

    def _open(self, *, read_only: bool) -> apsw.Connection:
        if read_only:
            flags = apsw.SQLITE_OPEN_READONLY
        else:
            # SQLite makes its files with the umask; rows name what a person works on.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            flags = apsw.SQLITE_OPEN_READWRITE
        name = f"file:{urllib.parse.quote(self.path)}"
        connection = apsw.Connection(name, flags=flags | apsw.SQLITE_OPEN_URI)
        try:
            connection.set_busy_timeout(BUSY_MS)
            connection.execute("PRAGMA mmap_size = 0; PRAGMA trusted_schema = OFF")
            if not read_only:
                connection.execute("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL")
            version = int(connection.pragma("user_version"))
            refuse_newer(version, self.path)
            if version == 0 and not read_only:
                with connection:
                    for statement in create_table():
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version = {SCHEMA}")
            connection.execute(f"SELECT {', '.join(_quoted(NAMES))} FROM calls ORDER BY id DESC LIMIT 1").fetchall()  # noqa: S608
        except BaseException:
            connection.close()
            raise
        return connection

    def write(self, final: Sequence[Values], noted: Sequence[Values]) -> None:
        """See `Ledger.write`."""
        if _inode(self.path) != self._inode:
            raise LedgerGoneError(f"{self.path} was deleted or replaced")

        def work() -> None:
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                if final:
                    connection.executemany(_REPLACE, final)
                if noted:
                    connection.executemany(_KEEP, noted)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

        _shielded(work)

    def spent(self, question: Question, ids: Iterable[str]) -> tuple[Sum, set[str]]:
        """See `Ledger.spent`."""
        if _inode(self.path) != self._inode:
            raise LedgerDownError(f"{self.path} was deleted or replaced")

        def work() -> tuple[Sum, set[str]]:
            connection = self._connection
            connection.execute("BEGIN")
            try:
                row: Any = connection.execute(sum_query("?", question), question.arguments()).fetchone()
                known = {one for part in _parts(list(ids)) for one in self._known(part)}
            finally:
                connection.execute("COMMIT")
            return Sum(*row), known

        return _shielded(work)

    def _known(self, ids: list[str]) -> Iterator[str]:
        marks = ", ".join("?" * len(ids))
        for (one,) in self._connection.execute(f"SELECT id FROM calls WHERE id IN ({marks})", ids):  # noqa: S608  # marks
            yield one

    def known(self, ids: Iterable[str]) -> set[str]:
        """Return which ids have a row."""
        return _shielded(lambda: {one for part in _parts(list(ids)) for one in self._known(part)})

    def groups(self, by: By, since: float, until: float, agent: str = "") -> list[Group]:
        """Return what was used, per key and day."""
        arguments = (since, until, *([agent] if agent else []))
        query = group_query("?", by, agent=bool(agent))
        return _shielded(lambda: [Group(*row) for row in self._connection.execute(query, arguments)])

    def rows(self, since: float = 0.0, until: float = float("inf")) -> Iterator[Values]:
        """Return rows in the order of time."""
        query = f'SELECT {", ".join(_quoted(NAMES))} FROM calls WHERE "time" >= ? AND "time" < ? ORDER BY "time", id'  # noqa: S608
        yield from self._connection.execute(query, (since, until))

    def prune(self, before: float) -> int:
        """See `Ledger.prune`."""

        def work() -> int:
            self._connection.execute(_PRUNE, (before,))
            return self._connection.changes()

        return _shielded(work)

    def newest(self) -> float:
        """See `Ledger.newest`."""
        row: Any = _shielded(lambda: self._connection.execute('SELECT max("time") FROM calls').fetchone())
        return float(row[0] or 0.0)

    def is_whole(self) -> bool:
        """Return whether the whole file makes sense; reads all of it."""
        try:
            return bool(_shielded(lambda: self._connection.pragma("quick_check", 1)) == "ok")
        except LedgerCorruptError:
            return False

    def close(self) -> None:
        """Close; the last connection of all moves the log into the file."""
        self._connection.close()


class SqlitePlace:
    """A file for the ledger, in a directory of its own."""

    is_file = True

    def __init__(self, path: str, alarm: Callable[[str], None]) -> None:
        """Name a file; nothing is opened yet."""
        self.name = path
        self._alarm = alarm

    def open(self) -> SqliteLedger:
        """See `Place.open`. A ledger that was there once and is not any more is said aloud."""
        mark = f"{self.name}.made"
        if not os.path.lexists(self.name) and os.path.lexists(mark):
            self._alarm(
                f"the ledger {self.name} is gone: a new one begins, and budgets count from what the journal has"
            )
        ledger = SqliteLedger(self.name)
        if not os.path.lexists(mark):
            os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        return ledger

    def is_broken(self) -> bool:
        """See `Place.is_broken`."""
        try:
            ledger = SqliteLedger(self.name)
        except LedgerCorruptError:
            return True
        with contextlib.closing(ledger):
            return not ledger.is_whole()

    def set_aside(self) -> str:
        """See `Place.set_aside`."""
        return set_aside(self.name)


def set_aside(path: str) -> str:
    """Give a broken database, with its log, another name that is free, and return that."""
    number = 1  # the lowest free one
    while os.path.lexists(f"{path}.broken-{number}"):
        number += 1
    kept = f"{path}.broken-{number}"
    for suffix in ("-wal", "-shm", ""):  # the log first: it must never be taken for that of a new file
        if os.path.lexists(path + suffix):
            os.rename(path + suffix, kept + suffix)
    return kept


_REPLACE = upsert("?", replace=True)
_KEEP = upsert("?", replace=False)
_PRUNE = prune_query("?")
assert len(NAMES) == len(COLUMNS)  # noqa: S101  # read once, at import


def _shielded(work: Callable[[], _T]) -> _T:
    """Turn SQLite's errors into the two that matter here."""
    try:
        return work()
    except (apsw.CorruptError, apsw.NotADBError) as error:
        raise LedgerCorruptError(str(error)) from error
    except (apsw.Error, OSError) as error:
        raise LedgerDownError(str(error) or type(error).__name__) from error


def _quoted(names: Sequence[str]) -> list[str]:
    return [f'"{name}"' for name in names]


def _parts(ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), _IDS):
        yield ids[start : start + _IDS]


def _inode(path: str) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino
