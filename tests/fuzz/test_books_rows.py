"""Rows: whatever an agent, an upstream or a stepping clock puts into one, it is stored, and bounded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_type_hints

from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.host.ledger_sqlite import SqliteLedger
from cloister.llm.ledger import Row
from cloister.runs.books_rows import MOST, MOST_USD, decode, encode, safe, tokens, values
from support.books import row_of

texts = st.text(st.characters(), max_size=20) | st.sampled_from(["\0" * 700, "\ud800", "x" * 4000, "\x1b[2J"])
counts = st.integers() | st.sampled_from([2**53, 2**63, 2**64, 10**40, -1])
numbers = st.floats() | st.sampled_from([1e300, -0.0])
kinds = {str: texts, int: counts, float: numbers, bool: st.booleans()}
odd = {name: kinds[kind] for name, kind in get_type_hints(Row).items() if kind in kinds and name != "id"}
rows = st.builds(Row, id=st.just("1"), source=st.sampled_from(["provider", "estimated"]), **odd)


@given(rows)
@settings(max_examples=300)
def test_every_row_becomes_one_that_can_be_stored(row: Row) -> None:
    """Made safe, a row goes through journal and database unchanged; what was ordinary stays as it was."""
    made = safe(row)
    assert safe(made) == made
    assert decode(encode(made)) == made
    assert 0 <= tokens(made) <= MOST
    assert 0 <= made.cost_usd <= MOST_USD
    assert made.model.isprintable()
    assert math.isfinite(made.time + made.first_byte_s + made.duration_s)
    assert len(encode(made)) < 1 << 16


def test_every_row_can_be_written(tmp_path: Path) -> None:
    """The database takes each of them, and gives it back."""
    ledger = SqliteLedger(f"{tmp_path}/ledger.db")

    @given(rows)
    @settings(max_examples=100)
    def write(row: Row) -> None:
        made = safe(row)
        ledger.write([values(made)], [])
        assert [row_of(one) for one in ledger.rows()] == [made]

    write()
    ledger.close()
