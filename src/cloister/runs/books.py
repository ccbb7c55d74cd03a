"""The books of one process: calls are noted in the journal, then written to the ledger by a thread of their own.

This is `llm.ledger.Books`. A call is one write(2) when it opens, and what has closed goes along; none waits for the
database.
Every row that is not in the ledger yet is in memory and in the journal, so sums are right at any moment and a crash
loses none:

    opened ── journal ── memory                      after a crash: a row with the reservation, `unknown`
    closed ── memory ── journal ── queue ── ledger   after a crash: the row, as closed
    refused ─ memory ── journal ── queue ── ledger

Between memory and journal is at most the rest of the event loop's turn, where `gather` was called.

Rows have ids of their own, and the id is the key of the ledger: writing one again changes nothing. When the disk is
full, `opened` raises and the call is refused; a row that closes then is kept in memory, and its reservation in the
journal. How a row gets into the ledger, and what happens when that is away or broken, is for `runs/books_writer.py`.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from cloister.errors import RetryError
from cloister.host.journal import SEGMENT_BYTES, Journal, Segment, frame
from cloister.host.ledger import Ledger, LedgerCorruptError, LedgerDownError, Place, Question, Sum
from cloister.llm.ledger import Row, Spent
from cloister.runs.books_rows import FINAL, OPENED, Entry, decode, encode, safe, tokens, unseen
from cloister.runs.books_writer import Care, Writer
from cloister.runs.metrics import Books, Metrics, Told

MOST_WAITING = 100_000
"""Rows that may wait for the ledger, about 100 MB; then calls are refused until it is back."""
MOST_REFUSALS = 10_000
"""Refusals kept while the journal cannot be written; they cost nothing, so the rest is counted and left out."""


class Health(NamedTuple):
    """How the books are, for metrics and `doctor`."""

    under_way: int
    waiting: int
    """Rows that are not in the ledger yet."""
    journal_bytes: int
    unwritten: int
    """Rows that are in memory only, because the journal could not be written."""
    dropped: int
    """Refusals left out. A call that left is never dropped."""
    ledger_down: bool


class BookKeeper:
    """Keeps the books. `opened`, `closed` and `refused` belong to one thread, `spent` to any."""

    def __init__(
        self,
        directory: str,
        place: Place,
        care: Care,
        *,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Take the journal over, and begin to write what it still holds.

        Args:
            directory: where the journal is, made when it is missing.
            place: opens connections to the ledger.
            care: how long rows are kept, and whom to tell.
            segment_bytes: see `host.journal`.

        Raises:
            RetryError: another process keeps these books.
            UnsupportedError: a newer program made the ledger.
            OSError: the journal cannot be read or made.
        """
        self.metrics = Metrics()
        self._alarm = care.alarm
        self._place = place
        self._reader: Ledger | None = None
        self._reading = threading.Lock()
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._unwritten: dict[str, bytes] = {}
        self._queue: deque[Entry] = deque()
        self._late: list[Entry] = []
        """Final rows that are not in the journal yet: for the rest of a turn of the loop, see `gather`."""
        self._soon: Callable[[Callable[[], None]], object] | None = None
        self._under_way = self._dropped = 0
        self._closed = False
        self._journal = Journal(directory, segment_bytes=segment_bytes)
        try:
            self._replay()
            if place.is_file:
                # Once open it can be read on a full disk, where opening it could not make the files of the WAL.
                with contextlib.suppress(LedgerDownError, LedgerCorruptError):  # the writer sees to it
                    self._reader = place.open()
            self._writer = Writer(self, directory, place, care)
        except BaseException:
            self._journal.close()
            raise
        self._writer.start()

    def opened(self, row: Row) -> None:
        """See `Books.opened`.

        Raises:
            OSError: it cannot be noted: the disk is full, or the ledger has been away for too long.
        """
        row = safe(row)
        data = frame(OPENED, encode(row))
        with self._lock:
            if self._closed or row.id in self._entries:
                raise OSError(errno.EINVAL, "the books are closed, or this call is in them")
            if len(self._queue) >= MOST_WAITING:
                raise OSError(errno.ENOBUFS, "too many rows wait for the ledger")
            if self._unwritten:
                self._write_again()
            segment = self._journal.append_frames(data) if not self._late else self._with_late(data)
            segment.pins += 1
            self._entries[row.id] = Entry(row, final=False, opened=segment)
            self._under_way += 1
            self.metrics.opened(row)

    def closed(self, row: Row) -> None:
        """See `Books.closed`. A row that was closed before stays as it was."""
        row = safe(row)
        with self._lock:
            entry = self._entries.get(row.id)
            if entry is None:
                entry = self._entries[row.id] = Entry(row, final=True)
            elif entry.final:
                return
            else:
                entry.row, entry.final = row, True
                self._under_way -= 1
                self.metrics.left(row)
            self._finish(entry)
            self.metrics.closed(row)

    def gather(self, soon: Callable[[Callable[[], None]], object]) -> None:
        """From now on write closed rows together with the next call that opens, or when `soon` runs what it is given.

        That is `call_soon` of the event loop whose thread these books belong to: at the end of its turn. A process
        that is killed within this turn has counted the reservation of such a call instead of its use. With a disk
        that is full, rows are kept as ever.
        """
        with self._lock:
            self._soon = soon

    def refused(self, row: Row) -> None:
        """See `Books.refused`."""
        row = safe(row)
        with self._lock:
            self.metrics.refused(row)
            if row.id in self._entries:
                return
            if len(self._unwritten) >= MOST_REFUSALS or len(self._queue) >= MOST_WAITING:
                self._dropped += 1
                return
            self._entries[row.id] = entry = Entry(row, final=True)
            self._finish(entry)

    def spent(self, agent: str, since: float, until: float, run: str = "", user: str = "") -> Spent:
        """See `Books.spent`. Calls under way count with their reservations.

        Asks the database: microseconds to milliseconds for SQLite, a connection of its own for PostgreSQL.

        Args:
            agent: whose calls.
            since: from this time on.
            until: before this time.
            run: only those of one run.
            user: only those of one user, where several share a ledger.

        Raises:
            RetryError: the ledger cannot be asked, so nobody knows.
        """
        with self._lock:  # before the database is asked: a row that leaves memory meanwhile is found there
            here = [
                row
                for row in (entry.row for entry in self._entries.values())
                if row.agent == agent
                and since <= row.time < until
                and (not run or row.run == run)
                and (not user or row.user == user)
                and row.outcome != "refused"
            ]
        total, known = self._ask(Question(agent, since, until, run, user), [row.id for row in here])
        missing = [row for row in here if row.id not in known]
        return Spent(
            total.requests + len(missing),
            total.tokens + sum(map(tokens, missing)),
            total.cost_usd + sum(row.cost_usd for row in missing),
        )

    def health(self) -> Health:
        """Return how the books are."""
        with self._lock:
            waiting = len(self._entries) - self._under_way
            return Health(
                self._under_way,
                waiting,
                self._journal.size(),
                len(self._unwritten),
                self._dropped,
                self._writer.down,
            )

    def metrics_text(self, budgets: dict[tuple[str, str, str], float] | None = None) -> bytes:
        """Return the text for `/metrics`; `budgets` is the used part, by agent, span and unit. Imports late."""
        from cloister.runs.metrics_text import render

        with self._lock:
            copy = self.metrics.copy()
        return render(copy, self.health(), budgets or {})

    def tell(self, budgets: Mapping[tuple[str, str, str], float]) -> Told:
        """Return the metrics as numbers, for a process that makes the text."""
        health = self.health()
        with self._lock:
            return self.metrics.tell(Books(*health[1:]), budgets)

    def drained(self, timeout_s: float) -> bool:
        """Wait until every final row is in the ledger; for tests and a tidy end."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self._lock:
                if len(self._entries) == self._under_way:
                    return True
            self._writer.wake()
            time.sleep(0.005)
        return False

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what can be written, and let go. What is left is in the journal for the next start."""
        with self._lock:
            self._closed, self._soon = True, None
            if self._late:
                self._write_late()
        self._writer.stop(timeout_s)
        with self._reading:
            if self._reader is not None:
                self._reader.close()
                self._reader = None
        with self._lock:
            if not self._writer.is_alive():
                self._journal.close()

    # What the writer calls.

    def take(self, most: int) -> list[Entry]:
        """Return the oldest rows that wait; they stay in memory until `settle`."""
        with self._lock:
            return [self._queue.popleft() for _ in range(min(most, len(self._queue)))]

    def give_back(self, batch: list[Entry]) -> None:
        """Put a batch that could not be written before all others again."""
        with self._lock:
            self._queue.extendleft(reversed(batch))

    def settle(self, batch: list[Entry]) -> list[Segment]:
        """Forget rows that are in the ledger now, and return the segments that nobody needs any more."""
        with self._lock:
            for entry in batch:
                for segment in (entry.opened, entry.finished):
                    if segment is not None:
                        segment.pins -= 1
                self._unwritten.pop(entry.row.id, None)
                self._entries.pop(entry.row.id, None)
            return self._journal.sweep()

    def tend(self) -> None:
        """Sync the journal, and write to it what it could not take before."""
        if self._unwritten:
            with self._lock, contextlib.suppress(OSError):  # still full; the next call or second tries again
                self._write_again()
        self._journal.sync()

    def absent(self, ids: list[str]) -> set[str]:
        """Return which ids are not in memory."""
        with self._lock:
            return {one for one in ids if one not in self._entries}

    # Within.

    def _finish(self, entry: Entry) -> None:
        """Write a final row, now or soon; it waits for the ledger from then on."""
        self._late.append(entry)
        if self._soon is None:
            self._write_late()
        elif len(self._late) == 1:
            try:
                self._soon(self._turn_ends)
            except RuntimeError:  # the loop is over
                self._write_late()

    def _turn_ends(self) -> None:
        with self._lock:
            if self._late:
                self._write_late()

    def _write_late(self) -> None:
        """Write the rows that are late; what the journal cannot take is kept in memory."""
        try:
            if self._unwritten:
                self._write_again()
            self._with_late(b"")
        except OSError:
            self._queue_late(None)

    def _with_late(self, data: bytes) -> Segment:
        """Write the rows that are late and further records behind them; raises OSError when it cannot, and none is."""
        segment = self._journal.append_frames(
            b"".join([*[frame(FINAL, encode(entry.row)) for entry in self._late], data])
        )
        self._queue_late(segment)
        return segment

    def _queue_late(self, segment: Segment | None) -> None:
        """Let the rows that were late wait for the ledger; None where the journal does not hold them."""
        late, self._late = self._late, []
        for entry in late:
            if segment is None:
                self._unwritten[entry.row.id] = encode(entry.row)
            else:
                entry.finished = segment
                segment.pins += 1
        self._queue.extend(late)
        self._writer.wake()

    def _write_again(self) -> None:
        """Write what the journal could not take, the oldest first; raises OSError when it still cannot."""
        while self._unwritten:
            one = next(iter(self._unwritten))
            segment = self._journal.append(FINAL, self._unwritten[one])
            segment.pins += 1
            self._entries[one].finished = segment
            del self._unwritten[one]

    def _replay(self) -> None:
        """Take over what an earlier process left: closed calls as they are, the others as noted."""
        damaged = 0
        for segment, reading in self._journal.replay():
            damaged += reading.damaged
            for record in reading.records:
                row = decode(record.payload)
                if row is None:
                    damaged += len(record.payload)
                    continue
                entry = self._entries.setdefault(row.id, Entry(unseen(row), final=False))
                segment.pins += 1
                if record.kind == OPENED and entry.opened is None:
                    entry.opened = segment
                elif record.kind == FINAL and entry.finished is None:
                    entry.row, entry.final, entry.finished = row, True, segment
                else:
                    segment.pins -= 1
        self._queue.extend(self._entries.values())
        if damaged:
            self._alarm(
                f"the accounting journal has {damaged} bytes that are no record: torn by a crash, or by a failing disk"
            )

    def _ask(self, question: Question, ids: list[str]) -> tuple[Sum, set[str]]:
        """Ask the ledger; a connection that failed is made anew, once."""
        with self._reading:
            for last in (False, True):
                try:
                    if self._reader is None:
                        self._reader = self._place.open()
                    return self._reader.spent(question, ids)
                except (LedgerDownError, LedgerCorruptError) as error:
                    if self._reader is not None:
                        self._reader.close()
                        self._reader = None
                    if isinstance(error, LedgerCorruptError):
                        self._writer.repair(error)
                    if last:
                        raise RetryError(
                            "ledger-unreachable",
                            f"what was spent cannot be known, because the ledger cannot be read: {error}",
                            where=self._place.name,
                            remedy="cloister usage",
                        ) from error
            raise AssertionError
