"""A model call that is written down: its request as it left, and every answer as it came.

A run without `llm.record` never imports this. Recording changes nothing of a call under way; when it has failed, no
further call is made. Of head fields only the names are kept: values can be keys.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from cloister.egress.http1 import Body, Headers
from cloister.llm.errors import Refusal
from cloister.llm.order import Order
from cloister.relay.llm.call import Call
from cloister.relay.whole_answer import WholeAnswer

_MODEL = 200
"""Characters of a model's name that are kept outside the body."""


class Recorder(Protocol):
    """Keeps what calls of one run said. No method waits or raises."""

    @property
    def failed(self) -> str:
        """Why nothing is recorded any more; empty while all is well."""
        ...

    def begin(self, call: str, about: dict[str, object], body: bytes) -> None:
        """Keep the request of a new call."""
        ...

    def head(self, call: str, about: dict[str, object]) -> None:
        """Keep what is known of an answer that begins."""
        ...

    def answer(self, call: str, data: bytes) -> None:
        """Keep a piece of its body."""
        ...

    def end(self, call: str, about: dict[str, object]) -> None:
        """The call is over."""
        ...


class RecordedCall(Call):
    """One call, and who writes it down."""

    def __init__(self, *parts: Any, recorder: Recorder) -> None:
        """Take what a `Call` takes, and who writes it down."""
        super().__init__(*parts)
        self._recorder = recorder
        self._recorded = ""
        """The call's id, from the moment in which its request was kept."""

    def _reserve(self, order: Order) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Go on, unless it could not be recorded."""
        if self._recorder.failed:
            self._refuse(self._unrecorded())
        else:
            super()._reserve(order)

    def on_response(self, status: int, phrase: bytes, headers: Headers, body: Body) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Keep what is known of an answer."""
        supply = self._supply
        assert supply is not None  # noqa: S101 - chosen before
        super().on_response(status, phrase, headers, body)
        about = {
            "time": time.time(), "status": status, "provider": supply.upstream.name, "attempt": self._tab.attempts,
            "request_id": self._tab.request_id, "fields": _names(headers),
        }  # fmt: skip
        self._recorder.head(self._recorded, about)

    def on_response_body(self, data: bytes) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Keep a piece."""
        self._recorder.answer(self._recorded, data)
        super().on_response_body(data)

    def _go(self) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Keep the request before it is sent for the first time; further attempts send the same."""
        order, supply = self._order, self._supply
        assert order is not None and supply is not None  # noqa: S101, PT018 - chosen before
        if not self._recorded:
            self._recorded = self._tab.id
            about = {
                "time": self._tab.time, "model": order.model[:_MODEL], "provider": supply.upstream.name,
                "route": self.route.name, "stream": order.stream, "fields": _names(self.exchange.headers),
            }  # fmt: skip
            self._recorder.begin(self._recorded, about, order.body)
            if self._recorder.failed:
                self._give_up(self._unrecorded(), maybe_billed=False)
                return
        super()._go()

    def _unrecorded(self) -> Refusal:
        words = f"this run's calls have to be recorded, and cannot be: {self._recorder.failed}"
        return Refusal(503, "recording-failed", words, again=False)

    def _take_whole(self, answer: WholeAnswer) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Take an answer that came in one read by its steps, which are what is recorded."""
        self.on_response(answer.status, answer.phrase, answer.headers, Body("length", len(answer.content)))
        self.on_response_body(answer.content)
        self.on_response_end([])

    def _settle(self, outcome: str, **rest: Any) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Close the record with the call."""
        first = not self._over
        super()._settle(outcome, **rest)
        if first and self._recorded:
            about = {"time": time.time(), "outcome": outcome, "status": self._tab.status}
            self._recorder.end(self._recorded, {**about, "reason": rest.get("reason", "")})


def _names(headers: Headers) -> list[str]:
    return [name.decode("latin-1").lower() for name, _ in headers]
