"""What model calls need of this machine: the books, the prices, and the secrets of providers. Opened late."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from functools import partial

from cloister.host.owner import Owner
from cloister.policy.model import Ledger
from cloister.relay.llm.service import Prices
from cloister.runs.books import BookKeeper
from cloister.runs.books_open import open_books
from cloister.runs.model_blocks import blocked
from cloister.runs.model_calls import ModelCalls
from cloister.runs.model_keys import LoginOwner, ProviderKeys
from cloister.runs.paths import Paths
from cloister.runs.price_list import PriceFiles


def say(text: str) -> None:
    """Tell whoever reads the process's standard error: for a broker, its log."""
    sys.stderr.write(f"cloister: {text}\n")
    sys.stderr.flush()


class Store:
    """The books of one process, opened when they are first needed."""

    def __init__(self, paths: Paths, settings: Callable[[], Ledger], alarm: Callable[[str], None] = say) -> None:
        """Open nothing yet."""
        self._paths, self._settings, self._alarm = paths, settings, alarm
        self.books: BookKeeper | None = None
        self.database = ""
        """The reference that the open books are kept by; empty for SQLite."""

    def __call__(self) -> BookKeeper:
        """Open them.

        Raises:
            CloisterError: another process keeps them, or they cannot be read.
        """
        if self.books is None:
            settings = self._settings()
            self.books = open_books(self._paths.state, settings, alarm=self._alarm)
            self.database = settings.database
            with contextlib.suppress(RuntimeError):  # no loop yet: whoever begins one says so
                self.books.gather(asyncio.get_running_loop().call_soon)
        return self.books

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


def calls_of(paths: Paths, owner: Owner, logins: LoginOwner, store: Store) -> ModelCalls:
    """Return the model calls of a process, with nothing opened yet."""
    prices = PriceFiles(paths, owner.uid)
    keys = partial(ProviderKeys, paths, owner, dict(os.environ), logins)
    return ModelCalls(store, every_second(prices.current), keys, partial(blocked, paths.blocked))
