"""The books against a model: whatever happens in whatever order, the ledger holds exactly the rows it should."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from cloister.llm.ledger import Row, Spent
from cloister.runs.books import BookKeeper
from cloister.runs.books_rows import tokens
from support.books import MIDNIGHT, ended, noted, open_books, refusal, stored

AGENTS = ("claude", "pi")
FULL = OSError(errno.ENOSPC, "No space left on device")


class Machine(RuleBasedStateMachine):
    """Calls open, close, are refused; the process crashes, restarts, and its disk fills up."""

    under_way = Bundle("under_way")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="books-"))
        self.rows: dict[str, Row] = {}
        """What must be in the ledger, or will be after a crash."""
        self.open: set[str] = set()
        self.number = 0
        self.full = False
        self.saved = False
        self.books: BookKeeper = self._open()

    def _open(self) -> BookKeeper:
        return open_books(self.directory, segment_bytes=1500)

    def _disk(self) -> mock._patch[mock.Mock] | mock._patch_pass_through:  # type: ignore[name-defined]
        return mock.patch.object(os, "write", side_effect=FULL if self.full else os.write)

    @rule(target=under_way, agent=st.sampled_from(AGENTS), day=st.integers(0, 2), tokens=st.integers(0, 10**6))
    def opens(self, agent: str, day: int, tokens: int) -> Row:
        """A call is noted, or refused when the disk is full."""
        self.number += 1
        row = noted(self.number, agent=agent, time=MIDNIGHT + day * 86400, output_tokens=tokens, run=f"run{day}")
        with self._disk():
            if self.full:
                with pytest.raises(OSError):  # noqa: PT011
                    self.books.opened(row)
            else:
                self.books.opened(row)
                self.rows[row.id] = row
                self.open.add(row.id)
        return row

    @rule(row=consumes(under_way), cost=st.floats(0, 10))
    def closes(self, row: Row, cost: float) -> None:
        """A call ends, if it was noted and its process lives."""
        if row.id in self.open:
            self.open.discard(row.id)
            with self._disk():
                self.books.closed(ended(row, cost_usd=cost))
            self.rows[row.id] = ended(row, cost_usd=cost)
            self.saved = self.saved or self.full

    @rule(agent=st.sampled_from(AGENTS))
    def refuses(self, agent: str) -> None:
        """A call never leaves."""
        self.number += 1
        row = refusal(self.number, agent=agent)
        with self._disk():
            self.books.refused(row)
        self.rows[row.id] = row
        self.saved = self.saved or self.full

    @rule()
    def drains(self) -> None:
        """The ledger catches up."""
        assert self.books.drained(10)
        self.saved = False

    @rule()
    def the_disk_fills_up_or_has_space_again(self) -> None:
        """The journal cannot be written, until it can."""
        self.full = not self.full

    @precondition(lambda self: not self.saved)  # what is in memory only is allowed to be lost, as its reservation
    @rule(tear=st.integers(0, 8))
    def crashes(self, tear: int) -> None:
        """The process is killed, in the middle of a write perhaps; another one takes over."""
        self.books._writer.stop(10)
        os.close(self.books._journal._lock)
        self.books._journal._lock = -1
        if tear and (segments := sorted(self.directory.glob("journal-*"))):
            with segments[-1].open("ab") as file:
                file.write(b"\x20\0\0\0torn"[:tear])
        self.open.clear()
        self.books = self._open()

    @rule()
    def restarts(self) -> None:
        """The process ends tidily; calls under way are left to the next one."""
        with self._disk():
            self.books.close(10)
        self.saved = False
        self.open.clear()
        self.books = self._open()

    @invariant()
    def sums_are_right_at_any_moment(self) -> None:
        """What was spent is what the model says, wherever the rows are."""
        for agent in AGENTS:
            for since, until, run in ((0.0, 4e9, ""), (MIDNIGHT, MIDNIGHT + 86400, ""), (0.0, 4e9, "run1")):
                rows = [
                    row
                    for row in self.rows.values()
                    if row.agent == agent
                    and since <= row.time < until
                    and row.outcome != "refused"
                    and run in {"", row.run}
                ]
                spent = self.books.spent(agent, since, until, run)
                expected = Spent(len(rows), sum(map(tokens, rows)), sum(row.cost_usd for row in rows))
                assert (spent.requests, spent.tokens) == (expected.requests, expected.tokens)
                assert spent.cost_usd == pytest.approx(expected.cost_usd)

    def teardown(self) -> None:
        """At the end, after one more start, the ledger is the model: each row once, nothing else."""
        self.books.close(10)
        last = self._open()
        assert last.drained(10)
        last.close()
        assert stored(self.directory) == self.rows
        for path in self.directory.iterdir():
            path.unlink()
        self.directory.rmdir()


TestBooks = Machine.TestCase
TestBooks.settings = settings(max_examples=40, stateful_step_count=30)
