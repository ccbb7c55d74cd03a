"""The ledger under the books: broken, deleted, newer, locked or too old, it is never silently empty."""

from __future__ import annotations

import time
from pathlib import Path

import apsw
import pytest

from cloister.errors import UnsupportedError
from cloister.host import ledger
from cloister.host.ledger_sqlite import SqliteLedger
from cloister.llm.ledger import Spent
from support.books import MIDNIGHT, ended, noted, open_books, stored

ALL = (0.0, float("inf"))


def test_a_broken_ledger_is_kept_aside_and_begun_anew(tmp_path: Path) -> None:
    """A file that is no database is said aloud and kept; calls go on, and rows of the journal are in the new one."""
    (tmp_path / "ledger.db").write_bytes(b"this was a database once" * 1000)
    told: list[str] = []
    books = open_books(tmp_path, told.append)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert books.drained(5)
    books.close()

    assert stored(tmp_path) == {noted(1).id: ended(noted(1))}
    assert (tmp_path / "ledger.db.broken-1").read_bytes().startswith(b"this was")
    assert any("broken" in text and "ledger.db.broken-1" in text for text in told)


def test_sums_of_a_broken_ledger_are_asked_of_the_new_one(tmp_path: Path) -> None:
    """When the damage is found by a question, the answer waits for the new ledger."""
    books = open_books(tmp_path)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert books.drained(5)
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"ledger.db{suffix}").unlink(missing_ok=True)
    (tmp_path / "ledger.db").write_bytes(b"no database" * 500)

    books.opened(noted(2))
    assert books.spent("claude", *ALL).requests >= 1
    books.close()


@pytest.mark.parametrize("running", [True, False])
def test_a_deleted_ledger_is_said_aloud_and_filled_from_the_journal(tmp_path: Path, *, running: bool) -> None:
    """A ledger that vanishes, under a broker or between two, is never silently empty."""
    told: list[str] = []
    books = open_books(tmp_path, told.append)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert books.drained(5)
    if not running:
        books.close()
    for path in tmp_path.glob("ledger.db*"):
        if not path.name.endswith(".made"):
            path.unlink()
    if not running:
        books = open_books(tmp_path, told.append)
    books.opened(noted(2))
    books.closed(ended(noted(2)))
    assert books.drained(5)
    books.close()

    rows = stored(tmp_path)
    assert noted(2).id in rows
    assert not running or noted(1).id in rows, "the journal still had it"
    assert any("gone" in text for text in told)


def test_a_newer_ledger_is_left_alone(tmp_path: Path) -> None:
    """A ledger that a newer program made is refused, and not a byte of it changes."""
    open_books(tmp_path).close()
    path = tmp_path / "ledger.db"
    with apsw.Connection(str(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(UnsupportedError):
        SqliteLedger(str(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize(("clock", "left"), [(MIDNIGHT + 86400 * 11, {3}), (4e9, {1, 2, 3}), (0.0, {1, 2, 3})])
def test_old_rows_go_and_a_clock_that_steps_takes_none(tmp_path: Path, clock: float, left: set[int]) -> None:
    """Rows older than the retention are deleted; by a clock far in the future or past, none that is young is."""
    books = open_books(tmp_path)
    days = {1: 0, 2: 0, 3: 10}
    for number, day in days.items():
        row = noted(number, time=MIDNIGHT + day * 86400 + number)
        books.opened(row)
        books.closed(ended(row))
    assert books.drained(5)
    books.close()

    retention_s = 5 * 86400.0 if clock < 3e9 else 11 * 86400.0
    again = open_books(tmp_path, retention_s=retention_s, clock=lambda: clock)
    again.opened(noted(4))
    again.closed(ended(noted(4), time=MIDNIGHT + 10 * 86400))
    assert again.drained(5)
    again.close()
    assert set(stored(tmp_path)) - {noted(4).id} == {noted(number).id for number in left}


def test_many_old_rows_go_in_several_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting does not hold the database for long: it goes on until nothing old is left."""
    monkeypatch.setattr("cloister.host.ledger_sqlite._PRUNE", ledger.prune_query("?").replace("LIMIT 5000", "LIMIT 4"))
    monkeypatch.setattr("cloister.runs.books_writer.TICK_S", 0.02)
    books = open_books(tmp_path)
    for number in range(10):
        row = noted(number, time=MIDNIGHT + number)
        books.opened(row)
        books.closed(ended(row))
    newest = noted(99, time=MIDNIGHT + 20 * 86400)
    books.opened(newest)
    books.closed(ended(newest))
    assert books.drained(10)
    books.close()
    again = open_books(tmp_path, retention_s=86400.0, clock=lambda: MIDNIGHT + 20 * 86400)
    deadline = time.monotonic() + 10
    while len(stored(tmp_path)) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    again.close()
    assert set(stored(tmp_path)) == {newest.id}


def test_a_ledger_that_somebody_locks_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another program holds the database, calls go on and sums are right; the rows follow."""
    monkeypatch.setattr("cloister.host.ledger_sqlite.BUSY_MS", 20)
    told: list[str] = []
    books = open_books(tmp_path, told.append)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert books.drained(5)
    other = apsw.Connection(str(tmp_path / "ledger.db"))
    other.execute("BEGIN IMMEDIATE")
    books.opened(noted(2))
    books.closed(ended(noted(2)))
    assert not books.drained(0.3)
    assert books.spent("claude", *ALL) == Spent(2, 240, 0.002)
    assert books.health().ledger_down
    other.execute("ROLLBACK")
    other.close()

    assert books.drained(10)
    assert not books.health().ledger_down
    books.close()
    assert len(stored(tmp_path)) == 2
    assert len(told) == 2, "away once, back once"


def test_a_writer_that_meets_the_unexpected_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error nobody thought of is told, and rows are written as soon as it is over."""
    told: list[str] = []
    books = open_books(tmp_path, told.append)
    assert books.drained(5)
    real = SqliteLedger.write
    monkeypatch.setattr(SqliteLedger, "write", lambda *_: 1 / 0)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert not books.drained(0.3)
    monkeypatch.setattr(SqliteLedger, "write", real)

    assert books.drained(10)
    books.close()
    assert stored(tmp_path) == {noted(1).id: ended(noted(1))}
    assert any("division by zero" in text for text in told)


def test_a_mistaken_suspicion_replaces_no_ledger(tmp_path: Path) -> None:
    """When a reader saw the broken file and a good one has its place by now, that stays."""
    told: list[str] = []
    books = open_books(tmp_path, told.append)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert books.drained(5)
    books._writer.repair(ledger.LedgerCorruptError("as it was a moment ago"))
    books.opened(noted(2))
    books.closed(ended(noted(2)))
    assert books.drained(5)
    books.close()

    assert len(stored(tmp_path)) == 2
    assert not list(tmp_path.glob("*.broken*"))
    assert told == []


def test_another_programs_database_is_not_written_into(tmp_path: Path) -> None:
    """A database that is none of ours is set aside as it is, tables and all."""
    path = tmp_path / "ledger.db"
    with apsw.Connection(str(path)) as connection:
        connection.execute("CREATE TABLE calls (note TEXT); INSERT INTO calls VALUES ('mine'); PRAGMA user_version = 1")
    connection.close()
    books = open_books(tmp_path)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert books.drained(5)
    books.close()

    kept = apsw.Connection(str(tmp_path / "ledger.db.broken-1"))
    assert kept.execute("SELECT note FROM calls").fetchall() == [("mine",)]
    kept.close()
    assert stored(tmp_path) == {noted(1).id: ended(noted(1))}
