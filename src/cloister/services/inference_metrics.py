"""`GET /metrics` of the inference service: to this machine only, without a key, since scrapers have none.

The text is made in a thread, and what makes it is imported with the first scrape: no call waits for either.
"""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus

from cloister.egress.http1 import Body, ResponseHead
from cloister.relay.exchange import Exchange
from cloister.runs.books import BookKeeper
from cloister.runs.model_calls import ModelCalls
from cloister.services.loopback import comes_from_loopback


class MetricsPage:
    """Answers scrapes."""

    def __init__(self, books: BookKeeper, calls: ModelCalls) -> None:
        """Take what is told of."""
        self._books, self._calls = books, calls
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, exchange: Exchange) -> bool:
        """Answer a scrape; False for any other request."""
        if exchange.method != "GET" or exchange.url.partition(b"?")[0] != b"/metrics":
            return False
        if not comes_from_loopback(exchange):
            _respond(exchange, 403, b"text/plain", b"metrics are told to this machine by its loopback address only\n")
            return True
        task = asyncio.get_running_loop().create_task(self._answer(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _answer(self, exchange: Exchange) -> None:
        budgets = self._calls.budgets(time.time(), time.monotonic())
        text = await asyncio.get_running_loop().run_in_executor(None, self._books.metrics_text, budgets)
        from cloister.runs.metrics_text import CONTENT_TYPE

        _respond(exchange, 200, CONTENT_TYPE.encode(), text)


def _respond(exchange: Exchange, status: int, kind: bytes, text: bytes) -> None:
    if exchange.connection.current is not exchange:
        return  # the client has gone
    exchange.keep_alive = exchange.keep_alive and exchange.ended
    fields = [(b"content-type", kind), (b"cache-control", b"no-store")]
    body = Body("length", len(text))
    head = ResponseHead(status, HTTPStatus(status).phrase.encode(), fields, body, close=not exchange.keep_alive)
    exchange.respond_whole(status, head.encode() + text)
