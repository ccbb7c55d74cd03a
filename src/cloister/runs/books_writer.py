"""The thread that brings rows from the books into the ledger, and deals with a ledger that is away, broken or too old.

- Away: rows wait in the journal and in memory, and it is tried again after 0.1 seconds, doubling up to 30.
- Broken or deleted: said aloud; a broken file gets another name; a new ledger is filled with what the journal still
  has.
- Too old: rows beyond `retention` are looked for every hour, and deleted some at a time.

Batches are small: between two of them every other thread gets its turn, and the event loop waits a millisecond at most.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from cloister.host.journal import Journal, Segment, read
from cloister.host.ledger import Ledger, LedgerCorruptError, LedgerDownError, LedgerGoneError, Place
from cloister.llm.ledger import Row
from cloister.runs.books_rows import FINAL, Entry, decode, unseen, values

BATCH = 250
GATHER_S = 0.05
"""Rows are gathered this long, so that a busy proxy costs twenty transactions a second and not one per call."""
TICK_S = 1.0
"""How often the journal is synced, and so what a power cut may cost."""
RETRY_S = (0.1, 30.0)
"""First and longest wait for a ledger that is away."""


PRUNE_S = 3600.0
"""How often rows that are too old are looked for."""


class Care(NamedTuple):
    """How the ledger is looked after."""

    alarm: Callable[[str], None]
    """Told what a person should know, in one sentence; called from any thread."""
    retention_s: float = float("inf")
    """How long rows are kept."""
    clock: Callable[[], float] = time.time
    """Seconds since the epoch; for the age of rows only, so that a clock that steps loses none."""


class Source(Protocol):
    """What the writer needs of the books."""

    def take(self, most: int) -> list[Entry]:
        """Return the oldest rows that wait."""
        ...

    def give_back(self, batch: list[Entry]) -> None:
        """Put a batch back."""
        ...

    def settle(self, batch: list[Entry]) -> list[Segment]:
        """Forget rows that are in the ledger."""
        ...

    def tend(self) -> None:
        """Look after the journal."""
        ...

    def absent(self, ids: list[str]) -> set[str]:
        """Return which ids are not in memory."""
        ...


class Writer(threading.Thread):
    """The one that writes. A daemon: a process that must end does not wait for a database."""

    def __init__(
        self,
        books: Source,
        directory: str,
        place: Place,
        care: Care,
    ) -> None:
        """Prepare; `start` begins."""
        super().__init__(name="ledger", daemon=True)
        self._books = books
        self._directory = directory
        self._place = place
        self._retention_s = care.retention_s
        self._alarm = care.alarm
        self._clock = care.clock
        self._ledger: Ledger | None = None
        self._event = threading.Event()
        self._broken: LedgerCorruptError | None = None
        self._suspected: LedgerCorruptError | None = None
        self._repaired = threading.Event()
        self._stopping = False
        self._wait_s = 0.0
        self._again = 0.0
        self._next_prune = self._next_sync = 0.0
        self.down = False

    def wake(self) -> None:
        """Say that rows wait."""
        if not self._event.is_set():
            self._event.set()

    def repair(self, error: LedgerCorruptError, timeout_s: float = 2.0) -> None:
        """Have a ledger that a reader found broken looked at, and replaced if it is; wait for it."""
        self._repaired.clear()
        self._suspected = error
        self._again = 0.0
        self.wake()
        self._repaired.wait(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Write what waits, if the ledger takes it, and end."""
        self._stopping = True
        self._event.set()
        self.join(timeout_s)

    def run(self) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Work until stopped."""
        while not self._stopping:
            self._event.wait(TICK_S)
            self._event.clear()
            if not self._stopping:
                time.sleep(GATHER_S)
            self._turn()
        self._again = 0.0
        self._turn()
        if self._ledger is not None:
            with contextlib.suppress(LedgerDownError, LedgerCorruptError):
                self._ledger.close()

    def _turn(self) -> None:
        """Do all that is to be done now."""
        now = time.monotonic()
        if now >= self._next_sync or self._stopping:
            self._next_sync = now + TICK_S
            self._books.tend()
        if now < self._again:
            return
        batch: list[Entry] = []
        try:
            ledger = self._open()
            while batch := self._books.take(BATCH):
                final = [values(entry.row) for entry in batch if entry.final]
                noted = [values(entry.row) for entry in batch if not entry.final]
                ledger.write(final, noted)
                done = batch
                batch = []
                Journal.delete(self._books.settle(done))
            self._prune(ledger)
        except LedgerCorruptError as error:
            self._books.give_back(batch)
            self._back_off(error)
            self._broken = error
        except Exception as error:  # noqa: BLE001  # whatever it is: a thread that died would keep every row from the ledger
            self._books.give_back(batch)
            self._back_off(error)
        else:
            self._wait_s = 0.0
            if self.down:
                self.down = False
                self._alarm("the ledger is back: all rows that waited are in it")

    def _open(self) -> Ledger:
        """Return the connection; make it, and what it is to, anew where that is needed."""
        error, self._broken = self._broken, None
        suspected, self._suspected = self._suspected, None
        if error is None and suspected is not None and self._place.is_broken():
            error = suspected  # and not a broken one's successor, which the reader had not seen yet
        if error is not None:
            self._forget()
            self._replace(error)
        if self._ledger is None:
            self._ledger = self._place.open()
        if error is not None:
            count = self._rebuild(self._ledger)
            self._alarm(f"a new ledger was begun; {count} rows that the journal still had are in it")
        self._repaired.set()
        return self._ledger

    def _replace(self, error: LedgerCorruptError) -> None:
        """Say what happened, and make room for a new ledger."""
        if isinstance(error, LedgerGoneError):
            self._alarm(f"the ledger is gone: {error}")
            return
        kept = self._place.set_aside()
        self._alarm(f"the ledger {self._place.name} is broken ({error}); it is kept as {kept}")

    def _rebuild(self, ledger: Ledger) -> int:
        """Write what the journal has and memory has not: rows that were in the lost ledger a moment ago."""
        final: dict[str, Row] = {}
        noted: dict[str, Row] = {}
        for record in read(self._directory).records:
            row = decode(record.payload)
            if row is not None:
                (final if record.kind == FINAL else noted)[row.id] = row
        absent = self._books.absent([*final, *noted])
        for part in _parts([row for one, row in final.items() if one in absent]):
            ledger.write([values(row) for row in part], [])
        for part in _parts([unseen(row) for one, row in noted.items() if one in absent and one not in final]):
            ledger.write([], [values(row) for row in part])
        return len(absent)

    def _back_off(self, error: Exception) -> None:
        if not self.down:
            self.down = True
            self._alarm(f"the ledger {self._place.name} cannot be written: {error}; rows wait in the journal")
        self._forget()
        first, longest = RETRY_S
        self._wait_s = min(longest, self._wait_s * 2) if self._wait_s else first
        self._again = time.monotonic() + self._wait_s

    def _forget(self) -> None:
        if self._ledger is not None:
            with contextlib.suppress(LedgerDownError, LedgerCorruptError):
                self._ledger.close()
            self._ledger = None

    def _prune(self, ledger: Ledger) -> None:
        """Delete what is too old, by the clock or by the newest row, whichever is earlier.

        A clock that stands years ahead when the machine starts, as some do until NTP answers, deletes nothing so.
        """
        if self._retention_s == float("inf") or time.monotonic() < self._next_prune:
            return
        now = min(self._clock(), ledger.newest())
        if not ledger.prune(now - self._retention_s):
            self._next_prune = time.monotonic() + PRUNE_S  # else it goes on with the next second


def _parts(rows: list[Row]) -> Iterator[list[Row]]:
    for start in itertools.count(0, BATCH):
        part = rows[start : start + BATCH]
        if not part:
            return
        yield part
