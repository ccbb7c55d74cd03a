"""One run under systemd, as its user's broker sees it: the lease, the records, the protections of the workspace.

    asked ──{"run"}──▶ given ──{"running"}──▶ running ──{"receipt"}──▶ undone ──▶ W, over
      └──F──▶ refused        └──────── the lease ended ────────▶ lost

What runs, and how it is held, is the system broker's to say. This keeps what the user's own verbs
look at (`ps`, `inspect`, `receipt`, `logs`, `why`), and undoes what was made in the workspace, when nothing
of the unit lives any more: removing a mount point on the host takes the mount away everywhere (namespaces(7)).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from cloister.errors import RetryError, UsageError
from cloister.host import apply as host_apply
from cloister.host import overlay_apply
from cloister.host.frames import Frame, FrameError, encode_list
from cloister.host.unit_cgroup import is_alive
from cloister.plan.steps import Plan
from cloister.plan.workspace import WorkspaceLayout
from cloister.runs.links import Link
from cloister.runs.protections import look_after, replaced, standing
from cloister.runs.starter import Starter
from cloister.runs.store import Receipt, Record, Store
from cloister.runs.supervision import broken_off
from cloister.runs.unit_part import COPY, unit_of, with_answer
from cloister.runs.unit_words import Told, closing_words, decode

GONE_AFTER_S = 30.0
"""How long a unit may take to be gone when its brokers are: what is in the workspace stays until then."""
_LOOK_S = 0.1
_LOST = "the system's broker went away, and the run with it; what it counted is in its own records"


class UnitRun:
    """One run of the user, from the request to its end."""

    def __init__(  # noqa: PLR0913  # made in one place, by name
        self, loop: asyncio.AbstractEventLoop, store: Store, state: str, plan: Plan, record: Record,
        layout: WorkspaceLayout, on_end: Callable[[UnitRun], None],
    ) -> None:  # fmt: skip
        """Take what is stored already, with the workspace's placeholders made."""
        self.plan = plan
        self.lease: Link | None = None
        self.link: Link | None = None
        """The outer half, until the system's broker has it."""
        self.starter: Starter | None = None
        self._loop, self._store, self._state = loop, store, state
        self._record = record
        self._layout = layout
        self._aside = record.mode == "overlay"
        """Changes are kept aside: reviewed by a person, so nobody looks at the workspace itself."""
        self._on_end = on_end
        self._status = "asked"
        self._standing = {} if self._aside else standing(layout)
        self._events = open(store.events_path(plan.run), "ab", buffering=0)  # noqa: SIM115  # closed by `_close`
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what comes over the lease --------------------------------------------------------------

    def on_frame(self, _: Link, frame: Frame) -> None:
        """Handle a frame of hostd, and later of the system's broker."""
        for descriptor in frame.descriptors:
            os.close(descriptor)
        if frame.kind == "F":
            self._refused(frame.payload)
        elif frame.kind == "J":
            self._told(decode(frame.payload))
        else:
            raise FrameError(f"the lease of a run brought a frame {frame.kind!r}")

    def on_close(self, _: Link) -> None:
        """The lease is over: in order after a receipt, else the run is lost."""
        if self._status not in ("ending", "over"):
            self._begin(self._lost())

    def _told(self, told: Told) -> None:
        if told.run is not None and self._status == "asked":
            self._given(told.run)
        if told.event is not None:
            self._events.write(msgspec.json.encode(told.event) + b"\n")
        if told.running and self._status == "given":
            self._status = "running"
            self._tell_starter()
            self._record = msgspec.structs.replace(self._record, status="running")
            self._store.update(self._record)
        if told.receipt is not None and self._status != "ending":
            self._begin(self._finish(told.receipt))

    def _given(self, answer: Plan) -> None:
        """The unit stands, and whoever waits for it talks with the system's broker from now on."""
        self._status = "given"
        self.plan = with_answer(self.plan, answer)
        self._store.create(self.plan, self._record)
        link, self.link = self.link, None
        if link:
            link.close()

    def _refused(self, payload: bytes) -> None:
        """Nothing was started: the caller gets the words as they came."""
        if self._status == "asked":
            code = payload[:1] if payload[:1] in (b"\x7e", b"\x7f") else b"\x7d"  # 126 and 127 tell of the command
            host_apply.undo(self.plan, self._state)
            self._say(code, payload[1:].rstrip(b"\n") + b"\n")
            self.withdraw()

    def withdraw(self) -> None:
        """Undo everything: nothing was started, so nothing is to be remembered."""
        self._status = "ending"
        host_apply.undo(self.plan, self._state)
        if self.starter:
            os.close(self.starter.output)
            if self.link:
                self.link.close()  # the outer half of a detached run, with nobody to tell it anything
        self.starter = self.link = None
        self._close()
        if self._aside:
            with contextlib.suppress(OSError):  # overlayfs leaves a directory that nobody may open
                overlay_apply.discard(f"{self._store.directory}/{self.plan.run}/{COPY}")
        self._store.remove(self.plan.run)

    def warn(self, what: str) -> None:
        """Write a warning into the run's events."""
        event = {"event": "warning", "time": time.time(), "what": what}
        self._events.write(msgspec.json.encode(event) + b"\n")

    # --- what the user asks ---------------------------------------------------------------------

    def execute(  # a request's parts, as they came
        self, fields: dict[str, str], words: list[bytes], environment: list[bytes], link: Link,
        descriptors: tuple[int, ...],
    ) -> None:  # fmt: skip
        """Hand a request for another command to the system's broker, with the connection of whoever asks.

        Raises:
            UsageError: the run is ending.
            RetryError: it is not there yet.
        """
        if self._status == "ending" or self.lease is None:
            raise UsageError("run-not-alive", f"the run {self.plan.run} is ending", remedy="cloister ps")
        if self._status != "running":
            raise RetryError("run-starting", "the run is still starting", where=self.plan.run, remedy="the same again")
        named = {**fields, "verb": "exec", "run": self.plan.run}
        kept = [item for item in environment if item.startswith((b"TERM=", b"COLORTERM=", b"LANG="))]
        self._ask(named, words, kept, (link.lend(), *descriptors[:3]))
        link.close()

    def stop(self, grace_s: float) -> None:
        """Ask the agent to end, and have it ended when it does not."""
        self._ask({"verb": "stop", "grace": f"{grace_s:g}"})

    def protection_touched(self) -> None:
        """Something protected was touched on the host: have the run ended where it is not what was mounted."""
        if self._status in ("given", "running") and (wrong := replaced(self._standing)):
            self._ask({"verb": "stop", "reason": "protection-lost"}, [line.encode() for line in wrong[:32]])

    def drop_lease(self) -> None:
        """End the run at once, by the one sign that nobody can overlook."""
        if self.lease:
            self.lease.close()

    def _ask(
        self, fields: dict[str, str], words: list[bytes] | None = None, environment: list[bytes] | None = None,
        descriptors: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        assert self.lease is not None  # noqa: S101  # set before anybody knows of the run
        head = [f"{name}={value}".encode("utf-8", "surrogateescape") for name, value in fields.items()]
        self.lease.send("L", encode_list(head), descriptors)
        self.lease.send("V", encode_list(words or []))
        self.lease.send("N", encode_list(environment or []))

    # --- the end --------------------------------------------------------------------------------

    def _begin(self, ending: Any) -> None:
        self._status = "ending"
        task = self._loop.create_task(ending)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, receipt: Receipt) -> None:
        """Undo what was made in the workspace, look at it, keep the receipt, and say what was found."""
        host_apply.undo(self.plan, self._state)
        found = await self._look_after()
        kept = msgspec.structs.replace(
            receipt, workspace=self.plan.workspace, warnings=(*found, *receipt.warnings), plan_digest=self.plan.digest()
        )
        self._store_end(self._record, kept, receipt.reason)
        if self.lease:
            self.lease.send("W", closing_words(found))
        self._close()

    async def _look_after(self) -> tuple[str, ...]:
        if self._aside:
            return ()
        return await self._loop.run_in_executor(None, look_after, self._layout, self._record.started)

    async def _lost(self) -> None:
        """No receipt will come: wait until nothing of the unit lives, then undo."""
        text = f"cloister: {_LOST} [unit-broker-gone]\n  try: again; sudo journalctl -u cloister-proxyd\n"
        self._say(b"\x7d", text.encode())
        warnings: tuple[str, ...] = (_LOST,)
        if await gone(self.plan.run):
            host_apply.undo(self.plan, self._state)
        else:
            warnings = (_LOST, "its unit lives on: what holds protected names in the workspace stays until it is gone")
        found = await self._look_after()
        record, receipt = broken_off(self.plan, self._record)
        self._store_end(record, msgspec.structs.replace(receipt, warnings=(*found, *warnings)), "broker-died")
        self._close()

    def _say(self, code: bytes, text: bytes) -> None:
        """Tell whoever waits for the start; a caller that was given away is told by the system's broker."""
        link, self.link = self.link, None
        if self.starter and self.starter.link is not link:
            self.starter.link.send("F", code + text)
            self.starter.link.close()
            os.close(self.starter.output)
            self.starter = None
        if link:
            link.send("F", code + text)
            link.close()

    def _store_end(self, record: Record, receipt: Receipt, reason: str) -> None:
        ended = msgspec.structs.replace(
            record, status="finished", finished=time.time(), exit_code=receipt.exit_code, reason=reason
        )
        self._store.finish(ended, msgspec.structs.replace(receipt, reason=reason))
        if self.starter:
            self.starter.fail(self.plan.run, receipt.exit_code, reason)
            self.starter = None

    def _tell_starter(self) -> None:
        starter, self.starter = self.starter, None
        if starter:
            starter.tell(self.plan.run)

    def _close(self) -> None:
        self._status = "over"
        self._events.close()
        if self.lease:
            self.lease.close()
        self._on_end(self)


async def gone(run: str, patience_s: float = GONE_AFTER_S) -> bool:
    """Wait until a run's unit has no process any more; return whether that came."""
    until = time.monotonic() + patience_s
    while is_alive(unit_of(run)):
        if time.monotonic() > until:
            return False
        await asyncio.sleep(_LOOK_S)
    return True
