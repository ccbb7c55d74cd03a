"""The price list of one user: their own file first, then what comes with Cloister; trusted as policy files are."""

from __future__ import annotations

from cloister.llm.prices import Entry, PriceList, parse_prices, price_list
from cloister.runs.paths import Paths
from cloister.runs.policies import read_trusted, stamp


class PriceFiles:
    """The user's prices, read again when the file changes."""

    def __init__(self, paths: Paths, uid: int) -> None:
        """Read nothing yet."""
        self._path = f"{paths.config}/prices.toml"
        self._uid = uid
        self._stamp: tuple[int, int, int] | None = None
        self._list = PriceList(())

    def current(self) -> PriceList:
        """Return the prices as the file is now.

        Raises:
            PolicyError: the file can be written by others, or is wrong; never the old prices, never those without it.
        """
        now = stamp(self._path)
        if now != self._stamp:
            self._stamp = None
            source = read_trusted(self._path, self._uid)
            own: tuple[Entry, ...] = parse_prices(source.text.decode("utf-8", "replace"), self._path) if source else ()
            self._list = price_list(own)
            self._stamp = now
        return self._list
