"""Reading a request, within bounds, until it is whole: nothing can be decided about half a body."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cloister.egress.http1 import Headers
from cloister.llm.errors import Refusal
from cloister.llm.routes import Route
from cloister.relay.llm.call import Call
from cloister.relay.llm.heads import Heads
from cloister.relay.llm.refusing import refuse
from cloister.relay.llm.tab import Tab

if TYPE_CHECKING:
    from cloister.relay.exchange import Exchange
    from cloister.relay.llm.service import Caller, Inference, Redacts


class Intake:
    """The sink of one request, whose caller is known."""

    __slots__ = ("_call", "_caller", "_exchange", "_heads", "_over", "_parts", "_route", "_service", "_size", "_task")

    def __init__(self, service: Inference, caller: Caller, exchange: Exchange, route: Route, heads: Heads) -> None:
        """Take a request; `start` begins to read it."""
        self._service, self._caller, self._exchange, self._route = service, caller, exchange, route
        self._heads = heads
        self._parts: list[bytes] = []
        self._size = 0
        self._over = False
        self._call: Call | None = None
        self._task: asyncio.Task[None] | None = None
        """Redacts, where that is not done at once."""

    def start(self) -> None:
        """Read, unless it is known to be too much."""
        exchange, bounds = self._exchange, self._service.bounds
        if exchange.body.framing == "length" and exchange.body.length > bounds.body_bytes:
            self._too_large()
        elif self._service.buffered > bounds.all_bodies_bytes:
            self._refuse(Refusal(503, "too-busy", "too many large requests are under way", 5))
        elif (body := exchange.take_whole(self)) is not None:
            self._size = len(body)
            self._service.buffered += self._size
            self._hand_over(body)
        else:
            if exchange.body.framing != "none" and not exchange.ended and _expects(exchange.headers):
                exchange.interim(100, b"Continue", [])
            exchange.attach(self)

    # The exchange's sink.

    def write_body(self, data: bytes) -> None:
        """Keep a piece."""
        if self._over:
            return
        self._size += len(data)
        self._service.buffered += len(data)
        self._parts.append(data)
        if self._size > self._service.bounds.body_bytes:
            self._drop()
            self._too_large()

    def end_body(self, trailers: Headers) -> None:  # noqa: ARG002 - model requests have none that matter
        """Hand the whole over."""
        if self._over:
            return
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._hand_over(body)

    def abandon(self) -> None:
        """The client is gone."""
        if self._call is not None:
            self._call.abandon()
        elif self._task is not None:
            self._task.cancel()  # ends the process with it: nobody needs its answer
            self._drop()
        elif not self._over:
            self._over = True
            self._drop()

    # Inside.

    def _hand_over(self, body: bytes) -> None:
        """Go on with a body that is whole."""
        self._over = True
        redactor = self._caller.redactor
        if redactor is None:
            self._go_on(body)
        elif (redacted := redactor.at_once(body)) is not None:
            self._go_on(*redacted)
        else:
            self._task = asyncio.get_running_loop().create_task(self._redact(redactor, body))

    async def _redact(self, redactor: Redacts, body: bytes) -> None:
        """Wait for a body without what is taken out; where that fails nothing is sent."""
        found = await redactor.aside(body)
        self._task = None
        if isinstance(found, Refusal):
            self._drop()
            self._refuse(found)
        else:
            self._go_on(*found)

    def _go_on(self, body: bytes, count: int = 0) -> None:
        """Begin the call."""
        if count:
            self._caller.record("redacted", {"matches": count, "route": self._route.name})
        self._call = self._make_call()
        self._call.start(body)

    def _make_call(self) -> Call:
        parts = (self._service, self._caller, self._exchange, self._route, self._size, self._heads)
        if self._caller.recorder is None:
            return Call(*parts)
        from cloister.relay.llm.recorded import RecordedCall

        return RecordedCall(*parts, recorder=self._caller.recorder)

    def _drop(self) -> None:
        self._service.buffered -= self._size
        self._size = 0
        self._parts.clear()

    def _too_large(self) -> None:
        most = self._service.bounds.body_bytes // (1024 * 1024)
        self._refuse(Refusal(413, "body-too-large", f"a request holds at most {most} MiB", again=False))

    def _refuse(self, refusal: Refusal) -> None:
        self._over = True
        Tab(self._service, self._caller, self._route).refuse(refusal)
        refuse(self._exchange, self._route.shape, refusal)


def _expects(headers: Headers) -> bool:
    """Say whether a client waits for leave to send its body (RFC 9110, section 10.1.1)."""
    return any([len(name) == 6 and name.lower() == b"expect" for name, _ in headers])  # noqa: C419, PLR2004 - a list is faster here, and 6 is its length
