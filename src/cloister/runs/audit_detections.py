"""Detections beside a keeper: fed with the lines it has just written, what they find goes into the log and to the run.

A match is an event of the log like any other (`detection.matched`), chained and signed. What the owner of a run has to
know (action `stop`) is told by `ordered`; alarms are sent by who exports the log. Detecting never keeps events out of
the log: what goes wrong here is said there, and a match that could not be written is written later.
"""

from __future__ import annotations

import os
import traceback
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from cloister.audit.chain import encode
from cloister.audit.detect import Detector, Match
from cloister.audit.detect_rules import rules_of
from cloister.audit.event import Event
from cloister.errors import CloisterError
from cloister.policy.model import Audit
from cloister.runs.audit_keeper import Keeper

MEMORY = "detections.json"
_MOST_WAITING = 1000
_MOST_MEMORY = 64 << 20
_SAVE_S = 60


class Order(NamedTuple):
    """What the owner of a run is told: end it, and why."""

    run: str
    user: str
    rule: str
    message: str


class Watch:
    """The rules in force, and the keeper whose lines they see."""

    def __init__(
        self, keeper: Keeper, audit: Audit, directory: str, ordered: Callable[[Order], None], *, source: str
    ) -> None:
        """Begin to watch; what was seen before is read from `directory`.

        Raises:
            PolicyError: a rule of the policy is wrong.
        """
        self._keeper, self._ordered, self._source = keeper, ordered, source
        self._wanted = (audit.rules, audit.detections)
        self._detector = Detector(rules_of(audit))
        self._path = f"{directory}/{MEMORY}"
        self._saved = b""
        self._save_at = 0
        self._waiting: deque[Event] = deque(maxlen=_MOST_WAITING)
        self._broken = False
        self._restore()
        keeper.seen = self.lines
        keeper.due = self.tick

    def obey(self, audit: Audit) -> None:
        """Take over other rules, where they are others; wrong ones change nothing.

        Raises:
            PolicyError: a rule is wrong.
        """
        if (audit.rules, audit.detections) == self._wanted:
            return
        self._wanted = (audit.rules, audit.detections)
        detector = Detector(rules_of(audit))
        detector.restore(self._detector.memory())
        self._detector = detector

    def lines(self, data: bytes) -> None:
        """Look at lines that are in the log now. Never raises."""
        try:
            found = self._detector.feed_lines(data)
        except Exception as error:  # noqa: BLE001  # a bug in a rule must not keep events out of the log
            self._complain(error)
            return
        if found:
            self._take(found)

    def tick(self, now_ns: int) -> None:
        """Tell what was held back, and remember what was seen; about once a second. Never raises."""
        self._take(self._detector.tick(now_ns))
        if now_ns >= self._save_at:
            self._save_at = now_ns + _SAVE_S * 1_000_000_000
            self._save()

    def close(self) -> None:
        """Remember what was seen."""
        self._save()

    def _take(self, found: list[Match]) -> None:
        now = self._keeper.now_ns()
        for match in found:
            self._waiting.append(match.as_event(now, self._source))
            if match.rule.rule.action == "stop" and match.run:
                rule = match.rule.rule
                self._ordered(Order(match.run, match.event.user, rule.name, rule.title or rule.name))
        while self._waiting:
            try:
                self._keeper.put([encode(self._waiting[0])])
            except OSError:
                return  # the keeper says so itself; they are put again with the next tick
            self._waiting.popleft()

    def _complain(self, error: Exception) -> None:
        """Say once that detections are out of order."""
        traceback.print_exc()
        if not self._broken:
            self._broken = True
            self._waiting.append(
                Event(time=self._keeper.now_ns(), kind="log.trouble", severity_id=4, source=self._source,
                      message=f"detections are out of order: {error!r}"[:500])
            )  # fmt: skip

    def _restore(self) -> None:
        try:
            with open(self._path, "rb") as file:
                self._detector.restore(file.read(_MOST_MEMORY))
        except OSError:
            return

    def _save(self) -> None:
        memory = self._detector.memory()
        if memory == self._saved:
            return
        fresh = f"{self._path}.new"
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(memory)
            os.rename(fresh, self._path)
        except OSError:
            return  # hosts are new again after a restart, no more
        self._saved = memory


def watch(
    keeper: Keeper, audit: Audit, directory: str, ordered: Callable[[Order], None], *, source: str
) -> tuple[Watch, str]:
    """Watch by a policy's rules; where they are wrong by those that come with Cloister, and say what is wrong."""
    try:
        return Watch(keeper, audit, directory, ordered, source=source), ""
    except CloisterError as error:
        return Watch(keeper, Audit(), directory, ordered, source=source), error.message
