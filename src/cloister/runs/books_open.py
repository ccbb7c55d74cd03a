"""Where a user's books are, and opening them as the policy's `[ledger]` says. Imports the database late."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from cloister.host.ledger import Place
from cloister.policy.model import Ledger
from cloister.policy.units import parse_duration
from cloister.runs import client
from cloister.runs.books import BookKeeper
from cloister.runs.books_writer import Care

Address = Callable[[], str]
"""Gives the `postgresql://` address that `[ledger] database` refers to, each time a connection is made."""


def directory(state: str) -> str:
    """Return the directory of the books below a user's state directory: journal, lock and the SQLite ledger."""
    return f"{state}/ledger"


def open_books(
    state: str, settings: Ledger, *, alarm: Callable[[str], None], address: Address | None = None
) -> BookKeeper:
    """Open the books of this user, and begin to write what the journal still holds.

    Args:
        state: the user's state directory (`Paths.state`).
        settings: the policy's table `[ledger]`.
        alarm: told what a person should know; called from any thread.
        address: gives the database's address; left out, the reference is read as of this process (`address_of`).

    Raises:
        RetryError: another broker of this user keeps the books; `ledger-in-use`.
        UnsupportedError: a newer Cloister wrote the ledger, or the extra `postgresql` is not installed.
        OSError: the directory cannot be made or written.
    """
    retention_s = float(parse_duration(settings.retention))
    place = ledger_place(state, settings, alarm=alarm, address=address)
    return BookKeeper(directory(state), place, Care(alarm, retention_s))


def ledger_place(
    state: str, settings: Ledger, *, alarm: Callable[[str], None], address: Address | None = None
) -> Place:
    """Return where the ledger is; nothing is opened yet. The arguments are those of `open_books`."""
    if not settings.database:
        from cloister.host.ledger_sqlite import SqlitePlace

        return SqlitePlace(f"{directory(state)}/ledger.db", alarm)
    from cloister.host.ledger_postgres import PostgresPlace

    return PostgresPlace(address or address_of(settings.database, client.home(), os.getuid(), os.environ))


def address_of(reference: str, home: str, uid: int, environment: Mapping[str, str]) -> Address:
    """Return a function that reads the reference `[ledger] database`, anew at each call.

    It may be called in any thread, that of an event loop included, and waits for the command a reference may name.

    Args:
        reference: a secret reference, such as `file:~/.config/cloister/ledger`.
        home: the user's home.
        uid: the user.
        environment: of this process, for `env:` and `command:`.
    """

    def read() -> str:
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        from cloister.host.secrets import SecretReader, Surroundings

        async def once() -> bytes:
            return await SecretReader(Surroundings(home, uid, environment, environment)).read(reference)

        with ThreadPoolExecutor(1) as helper:  # a thread without an event loop
            return helper.submit(asyncio.run, once()).result().decode("utf-8", "replace")

    return read
