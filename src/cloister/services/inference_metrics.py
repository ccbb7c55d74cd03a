"""`GET /metrics` of the inference service, for those who present a key of their own: it tells who spends how much.

The text is made in a thread, and what makes it is imported with the first scrape: no call waits for either.
"""

from __future__ import annotations

import asyncio

from cloister.relay.exchange import Exchange
from cloister.relay.llm.entry import presented
from cloister.runs.books import BookKeeper
from cloister.runs.model_calls import ModelCalls


class MetricsPage:
    """Answers scrapes."""

    def __init__(self, books: BookKeeper, calls: ModelCalls) -> None:
        """Take what is told of; nobody may see it yet."""
        self.watchers: frozenset[str] = frozenset()
        """Keys that open the page."""
        self._books, self._calls = books, calls
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, exchange: Exchange) -> bool:
        """Answer a scrape; False for any other request, and for whoever may not see: as if there was nothing."""
        if (exchange.method, exchange.url) != ("GET", b"/metrics"):
            return False
        if not self.watchers.intersection(presented(exchange.headers)):
            return False
        task = asyncio.get_running_loop().create_task(self._answer(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _answer(self, exchange: Exchange) -> None:
        shares = self._calls.budget_shares()
        text = await asyncio.get_running_loop().run_in_executor(None, self._books.metrics_text, shares)
        from cloister.runs.metrics_text import CONTENT_TYPE

        if exchange.connection.current is exchange:  # else the client has gone
            exchange.respond_message(200, [(b"content-type", CONTENT_TYPE.encode())], text)
