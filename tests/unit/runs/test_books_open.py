"""Opening the books as the policy says: SQLite among one's own records, or PostgreSQL by a reference."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cloister.errors import CloisterError
from cloister.policy.model import Ledger
from cloister.runs.books_open import address_of, directory, open_books
from support.books import ended, noted, stored


def test_without_a_word_the_ledger_is_a_file_of_ones_own(tmp_path: Path) -> None:
    """The default settings keep rows in SQLite below the state directory."""
    books = open_books(str(tmp_path), Ledger(), alarm=pytest.fail)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert books.drained(5)
    books.close()

    assert set(stored(Path(directory(str(tmp_path))))) == {noted(1).id}


def test_the_reference_is_read_with_each_connection(tmp_path: Path) -> None:
    """A password can change: the address is not kept, and can be had inside an event loop and outside one."""
    environment = {"BOOKS": "postgresql://one/x"}
    address = address_of("env:BOOKS", str(tmp_path), 0, environment)
    assert address() == "postgresql://one/x"
    environment["BOOKS"] = "postgresql://two/x"

    async def inside() -> str:
        return address()

    assert asyncio.run(inside()) == "postgresql://two/x"
    with pytest.raises(CloisterError):
        address_of("env:MISSING", str(tmp_path), 0, {})()
