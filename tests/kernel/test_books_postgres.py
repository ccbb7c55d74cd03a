"""The ledger in a real PostgreSQL: the same rows and sums, also when the server dies in the middle."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.cli import usage as usage_verb
from cloister.errors import RetryError, UnsupportedError
from cloister.host.ledger import COLUMNS
from cloister.host.ledger_postgres import PostgresLedger, PostgresPlace
from cloister.llm.ledger import Row
from cloister.policy.model import Ledger
from cloister.runs.books import BookKeeper
from cloister.runs.books_open import open_books as open_by_policy
from cloister.runs.books_writer import Care
from cloister.runs.usage import BYS, Line, Question, gather, postgres_ledger, sqlite_ledger
from support.books import MIDNIGHT, ended, noted, open_books, refusal, row_of
from support.postgres import Postgres

pytestmark = pytest.mark.kernel
psycopg = pytest.importorskip("psycopg")
ALL = (0.0, 4e9)


@pytest.fixture
def server() -> Iterator[Postgres]:
    """A running PostgreSQL with an empty database."""
    with Postgres() as postgres:
        yield postgres


def _books(directory: Path, server: Postgres, told: list[str] | None = None, **settings: object) -> BookKeeper:
    tell = told.append if told is not None else lambda _: None
    return BookKeeper(str(directory), PostgresPlace(lambda: server.address), Care(tell, **settings))


def _stored(server: Postgres) -> dict[str, Row]:
    names = ", ".join(f'"{name}"' for name, _ in COLUMNS)
    with psycopg.connect(server.address) as connection:
        rows = [row_of(values) for values in connection.execute(f"SELECT {names} FROM calls")]  # noqa: S608
    return {row.id: row for row in rows}


def test_rows_and_sums_are_those_of_sqlite(server: Postgres, tmp_path: Path) -> None:
    """The same calls give the same rows, sums and reports in both databases."""
    here, there = open_books(tmp_path / "sqlite"), _books(tmp_path / "postgres", server)
    rows = [noted(number, agent=("claude", "pi")[number % 2], time=MIDNIGHT + number * 9000.5) for number in range(40)]
    for books in (here, there):
        for row in rows:
            books.opened(row)
            source = "estimated" if row.id[-1] == "3" else "provider"
            books.closed(ended(row, stream=True, cache_write_1h_tokens=3, source=source))
        books.refused(refusal(99))
        books.opened(noted(100))
        assert books.drained(20)
    for question in ((*ALL,), (MIDNIGHT + 9000.5, MIDNIGHT + 90_005), (*ALL, "run1"), (*ALL, "", "bob")):
        one, other = here.spent("claude", *question), there.spent("claude", *question)
        assert (one.requests, one.tokens, one.cost_usd) == (other.requests, other.tokens, pytest.approx(other.cost_usd))
    assert there.spent("claude", *ALL).requests == 21
    here.close()
    there.close()

    assert _stored(server) == {row.id: row_of(values) for row, values in _sqlite_rows(tmp_path)}
    for by in BYS:
        question = Question(by=by)
        local = gather(str(tmp_path / "sqlite"), sqlite_ledger(f"{tmp_path}/sqlite/ledger.db"), question)
        remote = gather(str(tmp_path / "postgres"), postgres_ledger(server.address), question)
        assert remote.total.requests == local.total.requests == 40
        assert sorted(map(_rounded, remote.lines)) == sorted(map(_rounded, local.lines))


def _rounded(line: Line) -> tuple[object, ...]:
    """Return the numbers of a line; sums of dollars in another order differ in the last digit."""
    days = tuple(sorted((day, round(amount, 9)) for day, amount in line.days.items()))
    money = (round(line.cost_usd, 9), round(line.estimated_usd, 9))
    return (line.key, line.requests, line.refused, line.estimated, line.tokens, line.last, *money, days)


def _sqlite_rows(directory: Path) -> list[tuple[Row, tuple[object, ...]]]:
    ledger = sqlite_ledger(f"{directory}/sqlite/ledger.db")
    values = list(ledger.rows())  # type: ignore[union-attr]
    return [(row_of(one), one) for one in values]


def test_a_server_that_dies_in_the_middle_loses_and_doubles_nothing(server: Postgres, tmp_path: Path) -> None:
    """Killed and started again twice while calls are written, the server has each row once; no call waited for it."""
    told: list[str] = []
    books = _books(tmp_path, server, told)
    slowest = 0.0
    expected: dict[str, Row] = {}
    restarts = threading.Thread(target=_restart_twice, args=(server,))
    restarts.start()
    number = 0
    while restarts.is_alive() or number < 200:
        row = noted(number)
        started = time.perf_counter()
        books.opened(row)
        if number % 5:
            books.closed(ended(row))
            expected[row.id] = ended(row)
        else:
            expected[row.id] = row
        slowest = max(slowest, time.perf_counter() - started)
        number += 1
        time.sleep(0.001)
    restarts.join()
    assert slowest < 2.0
    assert books.drained(40), told
    assert books.spent("claude", *ALL).requests == number
    books.close()
    again = _books(tmp_path, server)  # those that never ended
    assert again.drained(20)
    again.close()

    assert _stored(server) == expected
    assert any("rows wait in the journal" in text for text in told)
    assert any("is back" in text for text in told)


def _restart_twice(server: Postgres) -> None:
    for _ in range(2):
        time.sleep(0.3)
        server.stop("immediate")
        time.sleep(0.5)
        server.start()


def test_rows_of_a_broker_that_ended_while_the_server_was_away_are_written_later(
    server: Postgres, tmp_path: Path
) -> None:
    """The journal carries rows over the end of the broker, to when the server is there again."""
    server.stop()
    books = _books(tmp_path, server)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    with pytest.raises(RetryError) as caught:
        books.spent("claude", *ALL)
    assert caught.value.reference == "ledger-unreachable"
    books.close(0.5)
    server.start()

    again = _books(tmp_path, server)
    assert again.drained(20)
    assert again.spent("claude", *ALL).requests == 1
    again.close()
    assert _stored(server) == {noted(1).id: ended(noted(1))}


def test_two_brokers_share_a_ledger(server: Postgres, tmp_path: Path) -> None:
    """Brokers of two hosts make the table at the same time, write side by side, and see each other's sums."""
    first, second = _books(tmp_path / "one", server), _books(tmp_path / "two", server)
    for number in range(100):
        for books, offset in ((first, 0), (second, 1000)):
            books.opened(noted(number + offset))
            books.closed(ended(noted(number + offset)))
    assert first.drained(20)
    assert second.drained(20)
    assert first.spent("claude", *ALL) == second.spent("claude", *ALL)
    assert first.spent("claude", *ALL).requests == 200
    first.close()
    second.close()


def test_text_that_postgres_does_not_take_stops_nothing(server: Postgres, tmp_path: Path) -> None:
    """NUL bytes, lone surrogates and numbers beyond 64 bits become a row, and those behind them follow."""
    books = _books(tmp_path, server)
    odd = noted(1, model="a\x00\ud800b", input_tokens=10**40, cost_usd=float("nan"))
    books.opened(odd)
    books.closed(ended(odd, model=odd.model))
    books.opened(noted(2))
    books.closed(ended(noted(2)))
    assert books.drained(20)
    books.close()
    assert set(_stored(server)) == {odd.id, noted(2).id}


def test_old_rows_go(server: Postgres, tmp_path: Path) -> None:
    """The retention holds in PostgreSQL, too."""
    books = _books(tmp_path, server)
    for number, day in ((1, 0), (2, 10)):
        row = noted(number, time=MIDNIGHT + day * 86400)
        books.opened(row)
        books.closed(ended(row))
    assert books.drained(20)
    books.close()
    again = _books(tmp_path, server, retention_s=5 * 86400.0, clock=lambda: MIDNIGHT + 11 * 86400)
    deadline = time.monotonic() + 10
    while noted(1).id in _stored(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    again.close()
    assert set(_stored(server)) == {noted(2).id}


def test_a_newer_ledger_is_left_alone(server: Postgres) -> None:
    """A table that a newer program made is refused."""
    PostgresLedger(server.address).close()
    with psycopg.connect(server.address) as connection:
        connection.execute("UPDATE cloister_ledger SET version = 99")
    with pytest.raises(UnsupportedError):
        PostgresLedger(server.address)


def test_a_wrong_password_is_not_in_the_message(tmp_path: Path) -> None:
    """Nothing of the address but host and user is told when there is no connection."""
    told: list[str] = []
    address = "postgresql://ann:correct-horse@127.0.0.1:1/books"
    books = BookKeeper(str(tmp_path), PostgresPlace(lambda: address), Care(told.append))
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    with pytest.raises(RetryError) as caught:
        books.spent("claude", *ALL)
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    books.close(0.1)

    assert told
    assert "correct-horse" not in " ".join([*told, str(caught.value), repr(books), repr(caught.value.__cause__)])


def test_usage_reads_it_by_the_reference_of_the_policy(
    server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The books and `cloister usage` find the database by `[ledger] database`, whose secret reference they read."""
    config = tmp_path / "config/cloister"
    config.mkdir(parents=True)
    (config / "cloister.toml").write_text('schema = 1\n[ledger]\ndatabase = "env:BOOKS"\n')
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("BOOKS", server.address)
    books = open_by_policy(str(tmp_path / "state/cloister"), Ledger(database="env:BOOKS"), alarm=lambda _: None)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert books.drained(20)
    books.close()

    assert not (tmp_path / "state/cloister/ledger/ledger.db").exists()
    assert usage_verb.main(["--since", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["requests"] == 1
