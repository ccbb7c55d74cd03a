"""The door: how a process hands events to the keeper of the log without ever waiting for it.

`put` queues; a thread of its own turns what was queued into events, hands them to the keeper, and waits for its word
that they are written. What the keeper did not confirm is kept and sent again. When nothing is confirmed for
`GRACE_S`, the door says so (`on_trouble`), and again when it is over: what that means for runs is for `audit_guard`.

Nothing is opened before the first event, and what that needs is imported in the thread: a run does not wait for it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from msgspec.structs import replace

from cloister.errors import CloisterError

if TYPE_CHECKING:
    from cloister.audit.event import Event

GRACE_S = 8.0
"""A keeper may be away so long, as when it is restarted, before it counts as lost."""
LOOK_S = 4.0
"""How often a keeper is asked whether it is well, while runs live."""
MOST_WAITING = 100_000
"""Things that may wait; beyond it they are counted as lost, and that is an event."""
_BATCH = 500
_RETRY_S = 0.5
_CLOSE_S = 3.0
Thing = tuple[str, tuple[Any, ...]]
"""The name of a function of `audit_events`, and what it gets."""


class Sink(Protocol):
    """Where events go."""

    def write(self, events: list[bytes]) -> None:
        """Have events written; none: look whether they could be.

        Raises:
            OSError: they are not.
            CloisterError: likewise.
        """
        ...

    def idle(self) -> None:
        """Called about once a second when there is nothing to write."""
        ...

    def close(self) -> None:
        """End."""
        ...


class About(NamedTuple):
    """Whose run it is: what all of its events have."""

    run: str
    agent: str
    user: str = ""
    account: str = ""
    source: str = "broker"


class Door:
    """A queue, and the thread behind it."""

    def __init__(
        self, sink: Callable[[], Sink], *, source: str = "broker", watching: Callable[[], bool] = lambda: False,
        on_trouble: Callable[[str], None] = lambda _: None, grace_s: float = GRACE_S,
    ) -> None:  # fmt: skip
        """Begin with the first event.

        Args:
            sink: returns where events go; called in the thread, which alone touches it.
            source: what this process is called.
            watching: whether anybody needs to know that the keeper is well, also while nothing happens.
            on_trouble: told, in the thread, why events cannot be written, and nothing when they can be again.
            grace_s: how long the keeper may be silent before that.
        """
        self._make, self._source, self._watching = sink, source, watching
        self._on_trouble, self._grace_s = on_trouble, grace_s
        self._queue: queue.SimpleQueue[Thing | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lost = 0
        self._trouble = ""
        self._failing_since = 0.0
        self._last_ok = 0.0
        self._made = 0
        self._name = os.urandom(6).hex()
        """Of this door: with a number it is the id of an event, which is sent again with the same."""

    @property
    def trouble(self) -> str:
        """Why events cannot be written; nothing while they can."""
        return self._trouble

    def put(self, make: str, *parts: Any) -> None:
        """Queue the events that `audit_events.MAKE(*parts)` returns. Never waits, never raises."""
        if self._queue.qsize() >= MOST_WAITING:
            self._lost += 1
            return
        self._queue.put((make, parts))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Hand over what waits, for a few seconds at most, and end."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_S)
            self._thread = None

    # --- in the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # whatever it was: nothing is recorded any more, and that must be known
            self._trouble = f"the door of the audit is broken: {error!r}"
            self._on_trouble(self._trouble)
            raise

    def _serve(self) -> None:
        self._sink = self._make()
        waiting: list[bytes] = []
        ending = False
        until = float("inf")
        while not (ending and not waiting) and time.monotonic() < until:
            if not ending:
                ending = self._take(waiting)
                until = time.monotonic() + _CLOSE_S if ending else until
            if waiting or self._look_due():
                self._write(waiting)
            else:
                self._idle()
        with contextlib.suppress(OSError, CloisterError):
            self._sink.close()

    def _take(self, waiting: list[bytes]) -> bool:
        """Wait for things and turn them into events; return whether the end was asked for."""
        block, wait_s = not waiting, 1.0
        while len(waiting) < _BATCH:
            try:
                item = self._queue.get(block, wait_s)
            except queue.Empty:
                break
            if item is None:
                return True
            block = False
            self._convert(item, waiting)
        if count := self._lost:
            self._lost -= count
            self._convert(("lost", (self._source, time.time(), count, "more than the door could hold")), waiting)
        return False

    def _convert(self, thing: Thing, waiting: list[bytes]) -> None:
        from cloister.audit.chain import encode
        from cloister.runs import audit_events

        make, parts = thing
        try:
            waiting += [encode(self._numbered(event)) for event in getattr(audit_events, make)(*parts)]
        except Exception:  # noqa: BLE001  # a bug in one thing told must not silence the others
            traceback.print_exc()
            said = audit_events.lost(self._source, time.time(), 1, f"{make} could not be told")
            waiting += [encode(self._numbered(event)) for event in said]

    def _numbered(self, event: Event) -> Event:
        self._made += 1
        return replace(event, id=f"{self._name}-{self._made}")

    def _look_due(self) -> bool:
        return bool(self._failing_since) or (self._watching() and time.monotonic() - self._last_ok > LOOK_S)

    def _write(self, waiting: list[bytes]) -> None:
        try:
            self._sink.write(waiting)
        except (OSError, CloisterError) as error:
            self._failed(str(error))
            time.sleep(_RETRY_S)
            return
        waiting.clear()
        self._last_ok = time.monotonic()
        self._failing_since = 0.0
        if self._trouble:
            self._trouble = ""
            self._on_trouble("")

    def _idle(self) -> None:
        try:
            self._sink.idle()
        except (OSError, CloisterError) as error:
            self._failed(str(error))

    def _failed(self, why: str) -> None:
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since >= self._grace_s and not self._trouble:
            self._trouble = why or "the keeper does not answer"
            self._on_trouble(self._trouble)
