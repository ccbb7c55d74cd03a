"""Recordings of model calls: from a run's calls to its sealed file. The way back is in `recordings_read`.

The event loop only queues; one thread per recorded run seals and writes, in order. A piece that cannot be written ends
the recording: the nonce of a piece is used once, so nothing is ever tried again with other words under it, and the
relay makes no further call of that run. Bounds do not refuse calls: what is beyond them is left out, and said.

Imported late: it brings cryptography with it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from cloister.host import recordings as files
from cloister.llm.recording import CHUNK_BYTES, Kind, Sealer

FILE = "model-calls.sealed"
"""In the directory of a run."""
Event = Callable[[str, dict[str, object]], None]


class Bounds(NamedTuple):
    """What is kept, in bytes."""

    body: int = 64 * 1024 * 1024
    """Of one request, and of the answers of one call."""
    run: int = 2 * 1024 * 1024 * 1024
    """Of all bodies of a run."""
    waiting: int = 256 * 1024 * 1024
    """Not written yet. A disk that stays behind by so much counts as one that failed."""


@dataclass(slots=True)
class _Open:
    """A call under way."""

    request: int
    answer: int = 0
    kept: int = 0
    """Of the answer."""


class _Item(NamedTuple):
    """Something to write; without a call, the end."""

    kind: Kind
    call: str
    data: bytes


class Recorder:
    """The recording of one living run. Its methods belong to the event loop, but for `_work`."""

    def __init__(  # noqa: PLR0913 - a file, its key, and two ways back into the event loop
        self, path: str, run: str, wrapping: bytes, event: Event, soon: Callable[..., object],
        bounds: Bounds | None = None,
    ) -> None:  # fmt: skip
        """Make the file. That it cannot be made is said as every other failure is: no call is made then.

        Args:
            path: of the file.
            run: whose calls.
            wrapping: the recordings' key of the user.
            event: writes an event of the run; called in the event loop.
            soon: has something called in the event loop, from any thread.
            bounds: what is kept.
        """
        self._why = ""
        self.calls = self.left_out = 0
        """How many calls were recorded, and how many of them not whole."""
        self._event, self._soon, self._bounds = event, soon, bounds or Bounds()
        self._sealer = Sealer(wrapping, run)
        self._file: files.Appendix | None = None
        self._open: dict[str, _Open] = {}
        self._kept = self._waiting = 0
        self._full = self._finishing = self._closing = False
        self._guard = threading.Lock()
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="recording", daemon=True)
        try:
            self._file = files.Appendix(path)
            self._file.append(self._sealer.head)
        except OSError as error:
            self._fail(error.strerror or str(error))
        self._thread.start()

    def __repr__(self) -> str:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        return f"Recorder({self.calls})"

    # What `relay/llm/recorded` calls.

    @property
    def failed(self) -> str:
        """Why nothing is recorded any more; empty while all is well."""
        return self._why or ("the run is over" if self._closing else "")

    def begin(self, call: str, about: dict[str, object], body: bytes) -> None:
        """Keep the request of a new call."""
        kept = self._room(body, self._bounds.body)
        self._open[call] = _Open(len(body))
        self.calls += 1
        if len(kept) < len(body):
            self.left_out += 1
        self._put_about("begin", call, {**about, "bytes": len(body), "kept": len(kept)})
        for start in range(0, len(kept), CHUNK_BYTES):
            self._put("request", call, kept[start : start + CHUNK_BYTES])

    def head(self, call: str, about: dict[str, object]) -> None:
        """Keep what is known of an answer that begins."""
        if call in self._open:
            self._put_about("head", call, about)

    def answer(self, call: str, data: bytes) -> None:
        """Keep a piece of its body."""
        one = self._open.get(call)
        if one is None:
            return
        kept = self._room(data, self._bounds.body - one.kept)
        if len(kept) < len(data) and one.kept == one.answer:
            self.left_out += 1
        one.answer += len(data)
        one.kept += len(kept)
        for start in range(0, len(kept), CHUNK_BYTES):
            self._put("answer", call, kept[start : start + CHUNK_BYTES])

    def end(self, call: str, about: dict[str, object]) -> None:
        """The call is over."""
        one = self._open.pop(call, None)
        if one is not None:
            self._put_about("end", call, {**about, "bytes": one.answer, "kept": one.kept})
            self._close_when_done()

    # Its end.

    def finish(self) -> None:
        """The run is over: close the file behind the last call under way."""
        self._finishing = True
        self._close_when_done()

    def summary(self) -> tuple[str, ...]:
        """Return what the run's receipt says."""
        words = [f"{self.calls} model calls were recorded [recorded]"]
        if self.left_out:
            words.append(f"{self.left_out} of them are longer than is kept, and not whole [recording-cut]")
        if self._why:
            words.append(f"recording ended before the run did: {self._why} [recording-failed]")
        return tuple(words)

    @property
    def alive(self) -> bool:
        """Whether something may still be written."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait until everything is written."""
        self._thread.join(seconds)

    # Inside.

    def _room(self, data: bytes, most: int) -> bytes:
        """Return what is kept of a body."""
        room = max(0, min(most, self._bounds.run - self._kept))
        if room < len(data) and not self._full and self._bounds.run - self._kept < len(data):
            self._full = True
            self._event("recording-full", {"bytes": self._bounds.run})
        kept = data if room >= len(data) else data[:room]
        self._kept += len(kept)
        return kept

    def _put_about(self, kind: Kind, call: str, about: dict[str, object]) -> None:
        """Queue what is known of a call; of a run that is full, without what the agent can make long."""
        if self._full and "fields" in about:
            about = {**about, "fields": []}
        data = msgspec.json.encode(about)
        self._kept += len(data)
        self._put(kind, call, data)

    def _put(self, kind: Kind, call: str, data: bytes) -> None:
        if self.failed:
            return
        with self._guard:
            self._waiting += len(data)
            behind = self._waiting > self._bounds.waiting
        if behind:
            self._fail("the disk is slower than the calls")
        else:
            self._queue.put(_Item(kind, call, data))

    def _close_when_done(self) -> None:
        if self._finishing and not self._open and not self._closing:
            self._closing = True
            self._queue.put(_Item("close", "", b""))

    def _fail(self, why: str) -> None:
        """Record nothing more. Called in either thread; the event is written in the event loop, once."""
        with self._guard:
            first, self._why = not self._why, self._why or why
        if first:
            try:
                self._soon(self._tell, why)
            except RuntimeError:
                return  # the loop has ended, and with it the run

    def _tell(self, why: str) -> None:
        if not self._finishing:  # else the run's events are closed; its receipt says what was known then
            self._event("recording-failed", {"what": why})

    def _work(self) -> None:
        """Write, in a thread of its own, until the run is over. A failure of any kind is one of the recording."""
        for item in self._merged():
            if item.kind == "close":
                break
            if self._file is None or self._why:
                continue
            try:
                self._file.append(self._sealer.seal(item.kind, item.call, item.data, last=item.kind == "end"))
            except OSError as error:
                self._fail(error.strerror or str(error))
            except Exception as error:  # noqa: BLE001 - unrecorded for whatever reason is unrecorded
                self._fail(type(error).__name__)
        self._close()

    def _close(self) -> None:
        if self._file is None:
            return
        try:
            if not self._why:
                self._file.append(self._sealer.close())
            self._file.close()
        except OSError as error:
            self._fail(error.strerror or str(error))

    def _merged(self) -> Iterator[_Item]:
        """Yield what is queued; small pieces of one answer that wait behind each other are one."""
        following: _Item | None = None
        while True:
            item, following = following or self._queue.get(), None
            pieces, size = [item.data], len(item.data)
            while item.kind == "answer" and not self._queue.empty():
                following = self._queue.get()
                size += len(following.data)
                if following[:2] != item[:2] or size > CHUNK_BYTES:
                    break
                pieces.append(following.data)
                following = None
            data = b"".join(pieces)
            with self._guard:
                self._waiting -= len(data)
            yield item._replace(data=data)
