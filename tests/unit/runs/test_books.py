"""The books: no call is lost, none is counted twice, and sums are right while rows are on their way."""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import msgspec
import pytest

from cloister.errors import RetryError
from cloister.host import journal, ledger
from cloister.host.journal import Journal
from cloister.llm.ledger import Row, Spent
from cloister.runs.books import BookKeeper
from cloister.runs.books_rows import FINAL, OPENED, decode
from support.books import MIDNIGHT, ended, noted, open_books, refusal, stored

ALL = (0.0, float("inf"))


def _crash(books: BookKeeper) -> None:
    """Let the books go as a killed process does: nothing more is written, and the kernel frees the lock."""
    books._writer.stop(5)
    os.close(books._journal._lock)
    books._journal._lock = -1


def test_the_columns_are_those_of_a_row() -> None:
    """The table has every field of a row, in its order, and the sum of its tokens."""
    assert (*Row.__struct_fields__, "tokens") == ledger.NAMES


def test_a_closed_call_is_a_row(tmp_path: Path) -> None:
    """Opened and closed, a call stands in the ledger exactly as it was closed; a refusal does, too."""
    books = open_books(tmp_path)
    row = ended(noted(1), reasoning_tokens=7, stream=True, attempts=2, request_id="req_1")
    books.opened(noted(1))
    books.closed(row)
    books.refused(refusal(2))
    assert books.drained(5)
    books.close()

    assert stored(tmp_path) == {row.id: row, refusal(2).id: refusal(2)}
    assert [name for name in os.listdir(tmp_path) if name.startswith("journal")] == []


def test_a_call_whose_end_nobody_saw_counts_with_its_reservation(tmp_path: Path) -> None:
    """After a crash, what was opened becomes a row: the reservation, estimated, outcome unknown."""
    books = open_books(tmp_path)
    books.opened(noted(1, source="provider", outcome="complete"))
    _crash(books)

    again = open_books(tmp_path)
    assert again.spent("claude", *ALL) == Spent(1, 1100, 0.0255)
    assert again.drained(5)
    again.close()
    assert stored(tmp_path) == {noted(1).id: noted(1)}


def test_what_was_closed_before_a_crash_is_written_once(tmp_path: Path) -> None:
    """Rows in the journal are written by the next start, and by the one after that again, without doubling."""
    books = open_books(tmp_path)
    books._writer.stop(5)  # the ledger never hears of them
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    books.refused(refusal(2))
    _crash(books)
    copies = [(path, path.read_bytes()) for path in tmp_path.glob("journal*")]

    for _ in range(2):
        again = open_books(tmp_path)
        assert again.drained(5)
        assert again.spent("claude", *ALL) == Spent(1, 120, 0.001)
        again.close()
        for path, content in copies:
            path.write_bytes(content)

    assert stored(tmp_path) == {noted(1).id: ended(noted(1)), refusal(2).id: refusal(2)}


def test_a_replayed_reservation_never_takes_the_place_of_a_row(tmp_path: Path) -> None:
    """When the close is gone from the journal and its row is in the ledger, an old opening changes nothing."""
    journal = Journal(str(tmp_path))
    books_rows = msgspec.msgpack.encode(noted(1))
    journal.append(1, books_rows).pins += 1
    journal.close()
    opening = next(tmp_path.glob("journal*")).read_bytes()
    next(tmp_path.glob("journal*")).unlink()
    books = open_books(tmp_path)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert books.drained(5)
    books.close()
    (tmp_path / "journal-0000000009.log").write_bytes(opening)

    again = open_books(tmp_path)
    assert again.drained(5)
    assert again.spent("claude", *ALL) == Spent(1, 120, 0.001)
    again.close()
    assert stored(tmp_path) == {noted(1).id: ended(noted(1))}


def test_a_second_close_changes_nothing(tmp_path: Path) -> None:
    """The first close stands, whatever a mistaken caller says later."""
    books = open_books(tmp_path)
    books._writer.stop(5)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    books.closed(ended(noted(1), cost_usd=99.0))

    assert books.spent("claude", *ALL).cost_usd == 0.001
    assert books.health().under_way == 0


def test_sums_count_what_is_asked_for(tmp_path: Path) -> None:
    """Agent, time, run and user bound a sum, at both ends exactly; refusals are in none. Memory and ledger agree."""
    books = open_books(tmp_path)
    books.opened(noted(1))
    for row in (
        noted(2, run="run2"),
        noted(3, agent="pi"),
        noted(4, user="bob"),
        noted(5, cache_read_tokens=1, cache_write_5m_tokens=2, cache_write_1h_tokens=4),
    ):
        books.opened(row)
        books.closed(ended(row))
    books.refused(refusal(6))
    for _ in range(2):  # on their way, and then in the ledger
        assert books.spent("claude", *ALL).requests == 4
        assert books.spent("claude", *ALL).tokens == 1100 + 120 + 120 + 127
        assert books.spent("claude", *ALL, run="run2") == Spent(1, 120, 0.001)
        assert books.spent("claude", *ALL, user="bob") == Spent(1, 120, 0.001)
        assert books.spent("pi", *ALL).requests == 1
        assert books.spent("claude", MIDNIGHT + 2, MIDNIGHT + 5).requests == 2
        assert books.spent("claude", MIDNIGHT + 6, math.inf) == Spent()
        assert books.drained(5)
    books.close()


def test_a_row_in_memory_and_in_the_ledger_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the commit and its notice a row is in both places; a sum of that moment counts it once."""
    books = open_books(tmp_path)
    written = threading.Event()

    def forget_nothing(_: object) -> list[object]:
        written.set()
        return []

    monkeypatch.setattr(books, "settle", forget_nothing)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    books.opened(noted(2))
    assert written.wait(5)

    assert stored(tmp_path) == {noted(1).id: ended(noted(1))}
    assert books.spent("claude", *ALL) == Spent(2, 1220, 0.0265)
    assert books.spent("claude", *ALL, run="run1") == Spent(2, 1220, 0.0265)
    books.close()


def test_a_full_disk_refuses_calls_and_loses_no_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the journal cannot be written `opened` raises, a close is kept, and all is well again by itself."""
    books = open_books(tmp_path)
    books._writer.stop(5)
    books.opened(noted(1))
    real = os.write

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError):  # noqa: PT011
        books.opened(noted(2))
    books.closed(ended(noted(1)))
    books.refused(refusal(3))
    assert books.spent("claude", *ALL) == Spent(1, 120, 0.001)
    assert books.health().unwritten == 2
    with pytest.raises(OSError):  # noqa: PT011
        books.opened(noted(4))

    monkeypatch.setattr(os, "write", real)
    books.opened(noted(5))
    assert books.health().unwritten == 0
    _crash(books)
    again = open_books(tmp_path)
    assert again.drained(5)
    again.close()
    rows = stored(tmp_path)
    assert set(rows) == {noted(1).id, refusal(3).id, noted(5).id}
    assert rows[noted(1).id] == ended(noted(1))


def test_refusals_are_bounded_while_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that is refused without end does not fill memory; what is left out is counted, and no call is."""
    monkeypatch.setattr("cloister.runs.books.MOST_REFUSALS", 10)
    books = open_books(tmp_path)
    books._writer.stop(5)
    books.opened(noted(1))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for number in range(2, 40):
        books.refused(refusal(number))
    books.closed(ended(noted(1)))

    assert books.health().dropped == 28
    assert books.spent("claude", *ALL) == Spent(1, 120, 0.001)


def test_calls_are_refused_when_too_many_rows_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that stays away does not fill memory: beyond a bound calls are refused."""
    monkeypatch.setattr("cloister.runs.books.MOST_WAITING", 3)
    books = open_books(tmp_path)
    books._writer.stop(5)
    for number in range(3):
        books.opened(noted(number))
        books.closed(ended(noted(number)))
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the number is looked at
        books.opened(noted(9))
    assert caught.value.errno == errno.ENOBUFS


def test_closed_books_take_nothing(tmp_path: Path) -> None:
    """After the end a call is refused, not forgotten."""
    books = open_books(tmp_path)
    books.close()
    with pytest.raises(OSError):  # noqa: PT011
        books.opened(noted(1))


def test_calls_under_way_at_the_end_are_in_the_journal(tmp_path: Path) -> None:
    """A broker that is stopped in mid-stream leaves the call to the next one."""
    books = open_books(tmp_path)
    books.opened(noted(1))
    books.close()

    again = open_books(tmp_path)
    assert again.drained(5)
    again.close()
    assert stored(tmp_path)[noted(1).id].outcome == "unknown"


def test_a_second_process_gets_a_clear_error(tmp_path: Path) -> None:
    """Two brokers never keep the same books."""
    books = open_books(tmp_path)
    with pytest.raises(RetryError) as caught:
        open_books(tmp_path)
    assert caught.value.reference == "ledger-in-use"
    books.close()


HOSTILE = [
    {"model": "a\x00b\ud800c\x1b[2J"},
    {"model": "x" * 100_000},
    {"input_tokens": 10**30},
    {"output_tokens": -5},
    {"reasoning_tokens": 2**63},
    {"cost_usd": math.nan},
    {"cost_usd": math.inf},
    {"cost_usd": -1.0},
    {"request_id": "\n" * 70_000},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda changes: next(iter(changes)))
def test_whatever_an_upstream_says_is_a_row(tmp_path: Path, changes: dict[str, object]) -> None:
    """Numbers beyond all bounds and names that no database takes neither stop the books nor the rows behind them."""
    books = open_books(tmp_path)
    books.opened(noted(1, **changes))
    books.closed(ended(noted(1), **changes))
    books.opened(noted(2))
    books.closed(ended(noted(2)))
    assert books.drained(5)
    books.close()

    rows = stored(tmp_path)
    assert rows[noted(2).id] == ended(noted(2))
    odd = rows[noted(1).id]
    assert odd.model.isprintable()
    assert len(odd.model) <= 512
    assert odd.input_tokens >= 0
    assert odd.output_tokens >= 0
    assert odd.cost_usd >= 0


def test_clock_steps_lose_no_row_of_a_sum(tmp_path: Path) -> None:
    """Rows are added up by their own times, in whatever order a stepping clock wrote them."""
    books = open_books(tmp_path)
    times = [MIDNIGHT + 100, MIDNIGHT - 5000, MIDNIGHT + 90_000, MIDNIGHT + 101]
    for number, when in enumerate(times):
        row = noted(number, time=when)
        books.opened(row)
        books.closed(ended(row))
    for _ in range(2):
        assert books.spent("claude", MIDNIGHT, MIDNIGHT + 86400).requests == 2
        assert books.spent("claude", *ALL).requests == 4
        assert books.drained(5)
    books.close()


def test_the_ledger_is_the_owners_alone(tmp_path: Path) -> None:
    """Neither the database nor its log can be read by others."""
    books = open_books(tmp_path)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert books.drained(5)
    modes = {path.name: os.stat(path).st_mode & 0o077 for path in tmp_path.iterdir()}
    books.close()

    assert "ledger.db" in modes
    assert not any(modes.values())


def _records(directory: Path) -> list[tuple[int, str]]:
    """Return kind and id of each record of the journal."""
    found = []
    for record in journal.read(str(directory)).records:
        row = decode(record.payload)
        assert row is not None
        found.append((record.kind, row.id))
    return found


def test_what_closes_is_written_with_the_next_call_or_at_the_end_of_the_turn(tmp_path: Path) -> None:
    """Rows that closed in a turn of the loop go into the journal with one write; sums are right meanwhile."""
    books, turn = open_books(tmp_path), list[Callable[[], None]]()
    books.gather(turn.append)
    for number in (1, 2, 3):
        books.opened(noted(number))
    books.closed(ended(noted(1)))
    books.closed(ended(noted(2)))
    assert books.spent("claude", *ALL) == Spent(3, 2 * 120 + 1100, 2 * 0.001 + 0.0255)
    with mock.patch("os.write", wraps=os.write) as write:
        books.opened(noted(4))
    assert write.call_count == 1
    assert _records(tmp_path)[3:] == [(FINAL, noted(1).id), (FINAL, noted(2).id), (OPENED, noted(4).id)]

    books.closed(ended(noted(3)))
    assert len(turn) == 2
    for end in turn:
        end()
    books.closed(ended(noted(4)))
    books.close()  # the turn never ends
    assert set(stored(tmp_path)) == {noted(number).id for number in (1, 2, 3, 4)}
    assert all(row.outcome == "complete" for row in stored(tmp_path).values())


def test_killed_within_the_turn_a_call_counts_with_its_reservation(tmp_path: Path) -> None:
    """A call that closed in the turn in which the process was killed is there as noted; one before it, as closed."""
    books, turn = open_books(tmp_path), list[Callable[[], None]]()
    books.gather(turn.append)
    books.opened(noted(1))
    books.opened(noted(2))
    books.closed(ended(noted(1)))
    turn.pop()()
    books.closed(ended(noted(2)))
    _crash(books)

    again = open_books(tmp_path)
    assert again.drained(5)
    again.close()
    assert stored(tmp_path) == {noted(1).id: ended(noted(1)), noted(2).id: noted(2)}


def test_a_disk_that_is_full_at_the_end_of_a_turn_loses_no_close(tmp_path: Path) -> None:
    """The row is kept, the next call is refused, and both are right when there is space again."""
    books, turn = open_books(tmp_path), list[Callable[[], None]]()
    books.gather(turn.append)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    with mock.patch("os.write", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(OSError, match="No space"):
            books.opened(noted(2))
        turn.pop()()
    books.opened(noted(2))
    books.closed(ended(noted(2)))
    books.close()
    assert stored(tmp_path) == {noted(1).id: ended(noted(1)), noted(2).id: ended(noted(2))}
