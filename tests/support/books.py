"""Made-up rows of the ledger, and books in a temporary directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from cloister.host.ledger import NAMES, Values
from cloister.host.ledger_sqlite import SqliteLedger, SqlitePlace
from cloister.llm.ledger import Row
from cloister.runs.books import BookKeeper
from cloister.runs.books_writer import Care

MIDNIGHT = 1_790_000_000 // 86400 * 86400.0


def noted(number: int, **changes: object) -> Row:
    """Return a call as it is noted before it is dispatched: with its reservation."""
    row = Row(
        id=f"{number:026d}",
        time=MIDNIGHT + number,
        run="run1",
        agent="claude",
        user="ann",
        provider="anthropic",
        route="messages",
        model="claude-opus-5",
        input_tokens=100,
        output_tokens=1000,
        cost_usd=0.0255,
        price="2026-10-24 claude-opus-5",
        source="estimated",
        outcome="unknown",
    )
    return msgspec.structs.replace(row, **changes)


def ended(row: Row, **changes: object) -> Row:
    """Return the same call as it ended."""
    end = {"output_tokens": 20, "cost_usd": 0.001, "source": "provider", "outcome": "complete", "status": 200}
    return msgspec.structs.replace(row, **{**end, "first_byte_s": 0.4, "duration_s": 2.0, **changes})


def refusal(number: int, **changes: object) -> Row:
    """Return a call that never left."""
    row = Row(
        id=f"{number:026d}", time=MIDNIGHT + number, run="run1", agent="claude", user="ann", model="claude-opus-5"
    )
    return msgspec.structs.replace(row, status=429, outcome="refused", reason="budget-exhausted", **changes)


def open_books(directory: Path, alarm: Callable[[str], None] | None = None, **settings: object) -> BookKeeper:
    """Open books in a directory; alarms go nowhere unless asked for."""
    tell = alarm or (lambda _: None)
    care = Care(tell, **{name: settings.pop(name) for name in ("retention_s", "clock") if name in settings})
    return BookKeeper(str(directory), SqlitePlace(f"{directory}/ledger.db", tell), care, **settings)


def row_of(values: Values) -> Row:
    """Return a row as it was before it became columns."""
    return msgspec.convert(dict(zip(NAMES[:-1], values[:-1], strict=True)), Row, strict=False)


def stored(directory: Path) -> dict[str, Row]:
    """Return every row of the ledger, by id."""
    ledger = SqliteLedger(f"{directory}/ledger.db", read_only=True)
    try:
        return {row.id: row for row in map(row_of, ledger.rows())}
    finally:
        ledger.close()
