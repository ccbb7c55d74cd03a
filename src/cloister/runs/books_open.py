"""Where a user's books are, and opening them as the policy's `[ledger]` says. Imports the database late."""

from __future__ import annotations

from collections.abc import Callable

from cloister.errors import PolicyError, Problem
from cloister.host.ledger import Place
from cloister.policy.model import Ledger
from cloister.policy.units import parse_duration
from cloister.runs.books import BookKeeper
from cloister.runs.books_writer import Care


def directory(state: str) -> str:
    """Return the directory of the books below a user's state directory: journal, lock and the SQLite ledger."""
    return f"{state}/ledger"


def open_books(
    state: str, settings: Ledger, *, alarm: Callable[[str], None], address: Callable[[], str] | None = None
) -> BookKeeper:
    """Open the books of this user, and begin to write what the journal still holds.

    Args:
        state: the user's state directory (`Paths.state`).
        settings: the policy's table `[ledger]`.
        alarm: told what a person should know; called from any thread.
        address: gives the `postgresql://` address that `settings.database` refers to, each time a connection is made.

    Raises:
        RetryError: another broker of this user keeps the books; `ledger-in-use`.
        UnsupportedError: a newer Cloister wrote the ledger, or the extra `postgresql` is not installed.
        PolicyError: a database is named, and no way to its address.
        OSError: the directory cannot be made or written.
    """
    where = directory(state)
    retention_s = float(parse_duration(settings.retention))
    place = ledger_place(state, settings, alarm=alarm, address=address)
    return BookKeeper(where, place, Care(alarm, retention_s))


def ledger_place(
    state: str, settings: Ledger, *, alarm: Callable[[str], None], address: Callable[[], str] | None = None
) -> Place:
    """Return where the ledger is; nothing is opened yet. The arguments are those of `open_books`."""
    if not settings.database:
        from cloister.host.ledger_sqlite import SqlitePlace

        return SqlitePlace(f"{directory(state)}/ledger.db", alarm)
    if address is None:
        raise PolicyError([Problem("nothing here resolves the reference to the ledger's database", ".ledger.database")])
    from cloister.host.ledger_postgres import PostgresPlace

    return PostgresPlace(address)
