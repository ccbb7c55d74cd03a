"""The runs of one broker on record: what is told of each, and what happens to them when nothing can be told any more.

`[audit] on_failure` of the policy decides: with `stop` living runs are ended and new ones refused while the keeper
takes nothing; with `alarm` they go on, and `cloister ps` and the receipt say so. A run starts without waiting for the
keeper.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from cloister.errors import CloisterError, RetryError
from cloister.policy.model import Audit
from cloister.runs.audit_door import About, Door, Sink
from cloister.runs.paths import Paths

if TYPE_CHECKING:
    from cloister.llm.ledger import Row
    from cloister.plan.steps import Plan
    from cloister.runs.active import ActiveRun
    from cloister.runs.audit_detections import Order
    from cloister.runs.store import Receipt, Record

LOST = "audit-lost"
DETECTED = "detection-matched"
_NS = 1_000_000_000


class RunAudit:
    """What one broker tells, and whom."""

    def __init__(  # made in one place, by name
        self, loop: asyncio.AbstractEventLoop, paths: Paths, source: str, settings: Callable[[], Audit],
        living: Callable[[], Iterable[ActiveRun]],
    ) -> None:  # fmt: skip
        """Open nothing yet.

        Args:
            loop: the broker's.
            paths: where the user's own log is kept, where the system keeps none.
            source: `broker` or `proxyd`.
            settings: returns `[audit]` as it is now.
            living: returns the runs that are alive.
        """
        self._loop, self._source, self._settings, self._living = loop, source, settings, living
        self._digest = ""
        self.watching: Callable[[], bool] = lambda: any(True for _ in living())
        """Whether it matters, also while nothing happens, that the keeper is well."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when nothing can be recorded any more, and when it can be again."""
        self._kept = Audit()

        def sink() -> Sink:
            from cloister.runs import audit_sinks

            return audit_sinks.choose(paths, lambda: self._kept, source, self._ordered)

        self._door = Door(sink, source=source, watching=self._watching, on_trouble=self._troubled)

    # --- what is told ---------------------------------------------------------------------------

    def admit(self) -> None:
        """Refuse a new run while nothing can be recorded.

        Raises:
            RetryError: `audit-lost`.
            PolicyError: the policy is broken.
        """
        self._kept = self._settings()  # in the loop: the door's thread reads no policy
        if self.stops:
            remedy = "cloister doctor; systemctl status cloister-auditd"
            message = f"what agents do cannot be recorded, so none is started: {self._door.trouble}"
            raise RetryError(LOST, message, where=".audit.on_failure", remedy=remedy)

    def began(self, run: ActiveRun, digest: str, user: str, account: str = "") -> None:
        """A run has its plan, and the steps before its launch are done."""
        plan, record, now = run.plan, run.record, time.time()
        about = About(plan.run, plan.agent, user, account, self._source)
        if digest != self._digest:
            before, self._digest = self._digest, digest
            how = "another policy than before" if before else "the first policy since this process began"
            self._door.put("policy_changed", about, now, digest, before, how)
        self._door.put("started", about, now, plan, record)
        run.about = about
        run.audit = self._told
        if self._door.trouble:
            run.note_unrecorded(self._door.trouble)

    def refused(self, agent: str, user: str, error: CloisterError) -> None:
        """A run was asked for and did not come to be."""
        about = About("", agent, user, "", self._source)
        self._door.put("refused", about, time.time(), error.reference, error.message)

    def loosened(self, user: str, what: str) -> None:
        """A person has lifted something that holds for runs to come.

        Raises:
            RetryError: `audit-lost`: it cannot be recorded, so it is not done.
            PolicyError: the policy is broken.
        """
        self.admit()
        self._door.put("policy_changed", About("", "", user, "", self._source), time.time(), "", "", what)

    def over(self, run: ActiveRun, receipt: Receipt) -> None:
        """A run has its receipt."""
        if run.about is None:
            return
        result = {
            "reason": receipt.reason, "bytes_up": receipt.bytes_up, "bytes_down": receipt.bytes_down,
            "duration_ns": int((receipt.finished - receipt.started) * _NS), "exit_code": receipt.exit_code,
            "connections": receipt.connections, "denials": receipt.denials, "warnings": len(receipt.warnings),
        }  # fmt: skip
        self._door.put("ended", run.about, receipt.finished, run.plan, result)

    def broken_off(self, plan: Plan, record: Record, user: str) -> None:
        """A killed broker's run was undone by this one."""
        about = About(plan.run, plan.agent, user, "", self._source)
        result = {"reason": record.reason, "bytes_up": 0, "bytes_down": 0, "duration_ns": 0, "exit_code": 125}
        self._door.put("ended", about, time.time(), plan, result)

    def model_called(self, run: ActiveRun, row: Row) -> None:
        """A model call of a run ended."""
        if run.about is not None:
            self._door.put("model_called", run.about, row)

    def _told(self, run: ActiveRun, kind: str, fields: dict[str, object]) -> None:
        self._door.put("of_run", run.about, time.time(), kind, fields)

    def close(self) -> None:
        """Hand over what waits, and end."""
        self._door.close()

    def _watching(self) -> bool:
        return self.watching()

    # --- when nothing can be told -----------------------------------------------------------------

    @property
    def trouble(self) -> str:
        """Why nothing can be recorded; nothing while it can."""
        return self._door.trouble

    def _ordered(self, order: Order) -> None:
        """Called in the door's thread: a detection wants a run stopped."""
        self._loop.call_soon_threadsafe(self._stop, order)

    def _stop(self, order: Order) -> None:
        for run in list(self._living()):
            if run.plan.run == order.run:
                run.live.refuse(DETECTED, f"the detection {order.rule} matched", [order.message])

    @property
    def stops(self) -> bool:
        """Whether nothing may run now, since nothing can be recorded."""
        return bool(self._door.trouble) and self._wants_stop()

    def _wants_stop(self) -> bool:
        try:
            return self._settings().on_failure == "stop"
        except CloisterError:
            return True  # a broken policy does not loosen anything

    def _troubled(self, why: str) -> None:
        """Called in the door's thread."""
        self._loop.call_soon_threadsafe(self._obey, why)

    def _obey(self, why: str) -> None:
        for run in list(self._living()):
            if not why:
                run.note_unrecorded("")
            elif self._wants_stop():
                run.live.refuse(LOST, "what the agent does cannot be recorded any more", [why])
            else:
                run.note_unrecorded(why)
        self.on_change()


def unrecorded(run: ActiveRun) -> tuple[str, ...]:
    """Return what the receipt says of a run that was not on record for a while."""
    return (f"what it did was not recorded for a while: {run.unrecorded} [{LOST}]",) if run.unrecorded else ()
