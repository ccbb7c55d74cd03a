"""What model calls need of this machine: the books, the prices, and the secrets of providers. Opened late."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from cloister.host.owner import Owner
from cloister.host.secrets import SecretReader, Surroundings
from cloister.policy.model import Ledger
from cloister.relay.llm.service import Prices
from cloister.runs.books import BookKeeper
from cloister.runs.books_open import open_books
from cloister.runs.model_blocks import blocked
from cloister.runs.model_calls import ModelCalls
from cloister.runs.paths import Paths
from cloister.runs.price_list import PriceFiles


def say(text: str) -> None:
    """Tell whoever reads the process's standard error: for a broker, its log."""
    sys.stderr.write(f"cloister: {text}\n")
    sys.stderr.flush()


def secret_reader(paths: Paths, owner: Owner, environment: Mapping[str, str]) -> SecretReader:
    """Return who reads the keys of providers: the broker's own environment counts, and no run's."""
    return SecretReader(Surroundings(paths.home, owner.uid, own=environment))


class Store:
    """The books of one process, opened when they are first needed."""

    def __init__(
        self, paths: Paths, owner: Owner, settings: Callable[[], Ledger], alarm: Callable[[str], None] = say
    ) -> None:
        """Open nothing yet."""
        self._paths, self._owner, self._settings, self._alarm = paths, owner, settings, alarm
        self.books: BookKeeper | None = None

    def __call__(self) -> BookKeeper:
        """Open them.

        Raises:
            CloisterError: another process keeps them, or they cannot be read.
        """
        if self.books is None:
            settings = self._settings()
            address = partial(self._address, settings.database) if settings.database else None
            self.books = open_books(self._paths.state, settings, alarm=self._alarm, address=address)
            with contextlib.suppress(RuntimeError):  # no loop yet: whoever begins one says so
                self.books.gather(asyncio.get_running_loop().call_soon)
        return self.books

    def _address(self, reference: str) -> str:
        """Return the database's address as it is now; called from the thread that writes the ledger."""
        reader = secret_reader(self._paths, self._owner, dict(os.environ))
        return asyncio.run(reader.read(reference)).decode("utf-8", "replace")

    def close(self) -> None:
        """Write what waits, and close."""
        if self.books is not None:
            self.books.close()


def every_second(load: Callable[[], Prices]) -> Callable[[], Prices]:
    """Return the same, asked at most once a second: looking for a changed file costs as much as a call."""
    kept: list[tuple[float, Prices]] = []

    def current() -> Prices:
        now = time.monotonic()
        if not kept or now - kept[0][0] >= 1.0:
            kept[:] = [(now, load())]
        return kept[0][1]

    return current


@contextlib.contextmanager
def model_calls(
    paths: Paths, owner: Owner, settings: Callable[[], Ledger] = Ledger
) -> Iterator[tuple[ModelCalls, Store]]:
    """Give the model calls of a process and their books, which are closed at the end."""
    store = Store(paths, owner, settings)
    prices = PriceFiles(paths, owner.uid)
    try:
        reader = partial(secret_reader, paths, owner, dict(os.environ))
        yield ModelCalls(store, every_second(prices.current), reader, partial(blocked, paths.blocked)), store
    finally:
        store.close()
