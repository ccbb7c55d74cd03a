"""Runs that live, whatever holds them: what a user's broker and the system's do with them alike.

    open ──▶ store ──▶ apply ──▶ (a backend starts it) ──▶ end ──▶ undo ──▶ receipt

How a run is started, and what of it beside its plan has to be ended, is for `supervise` (a user's
own sandboxes) and `unit_supervise` (units of systemd). Each step leaves store and host such that
`recover` of the next broker can finish the job.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from cloister.errors import CloisterError, RetryError, UsageError
from cloister.host import apply as host_apply
from cloister.host.frames import Frame, encode_list
from cloister.plan.steps import Plan
from cloister.runs import audit_environment
from cloister.runs.active import FLAG_PTY, ActiveRun, Command
from cloister.runs.audit_runs import RunAudit, unrecorded
from cloister.runs.home_files import said_aloud
from cloister.runs.links import Connect
from cloister.runs.live import Outcome
from cloister.runs.prepare import Kitchen, Prepared, mapping
from cloister.runs.provisions import Provided, Provisions
from cloister.runs.request import RunRequest
from cloister.runs.store import Receipt, Record, Store

CLOSE_EGRESS_S = 2.0
FILTER_OUTDATED = (
    "its proxy obeys the new policy, its direct connections obey that of its start: end the run and start it again"
)


class Supervision:
    """The runs of one broker, from the moment they live."""

    SOURCE = "broker"
    """What the audit calls this process."""

    def __init__(self, loop: asyncio.AbstractEventLoop, kitchen: Kitchen, connect: Connect) -> None:
        """Know where things are; start nothing."""
        self._loop = loop
        self._kitchen = kitchen
        self._paths = kitchen.paths
        self._connect = connect
        self._store = Store(self._paths.runs)
        self._runs: dict[str, ActiveRun] = {}
        self._provisions = Provisions(loop, kitchen, self._runs.values)
        self._audit = RunAudit(loop, kitchen.paths, self.SOURCE, kitchen.policies.audit, self._runs.values)
        self._provisions.called = self._audit.model_called
        self._endings: set[asyncio.Task[None]] = set()
        self._one_ended = asyncio.Event()

    @property
    def busy(self) -> bool:
        """Whether any run is alive."""
        return bool(self._runs)

    # --- starting ---------------------------------------------------------------------------

    def _apply(self, provided: Provided, plan: Plan, record: Record, link: Any) -> host_apply.Applied:
        """Store the plan, then do what it says.

        Raises:
            CloisterError: nothing is left of it, but for the stored plan.
        """
        try:
            if link.closed:
                raise UsageError("not-started", "whoever asked for the run went away before it started")  # noqa: TRY301
            self._store.create(plan, record)
            return self._provisions.apply(provided, plan)
        except BaseException:
            self._provisions.left(plan.run)
            raise

    async def _confirm(
        self, prepared: Prepared, request: RunRequest, link: Any, on_close: Callable[[Any], None]
    ) -> None:
        """Show what is carried in from the environment, and ask, on a terminal.

        Raises:
            UsageError: the person said no, or could not be asked.
        """
        if not (request.pty and prepared.carried_names and prepared.agent.environment_audit) or request.yes:
            return
        values = {name: prepared.environment[name] for name in prepared.carried_names}
        text = audit_environment.describe(values, prepared.model_keys)
        answer: asyncio.Future[str] = self._loop.create_future()

        def on_frame(_: Any, frame: Frame) -> None:
            if frame.kind == "A" and not answer.done():
                answer.set_result(frame.payload[:1].decode("ascii", "replace").lower())

        def on_gone(closed: Any) -> None:
            if not answer.done():
                answer.set_result("-")
            on_close(closed)

        link.rebind(on_frame, on_gone)
        link.send("Q", encode_list([text.encode("utf-8", "backslashreplace"), b"ynYN", b"y", b"-"]))
        letter = await answer
        if letter == "n":
            remedy = "cloister run --yes, or remove names from pass_environment"
            raise UsageError("not-started", "not started, as you said", remedy=remedy)
        if letter != "y" or link.closed:
            message = "not started: nobody answered what is carried in from the environment"
            raise UsageError("not-answered", message, remedy="cloister run --yes")

    def _go(self, run: ActiveRun, prepared: Prepared) -> bytes:
        """Return what the inner half gets as its last word before the agent starts."""
        launch = run.plan.launch
        return (
            (FLAG_PTY if launch.pty else 0).to_bytes(4, "little")
            + encode_list([os.fsencode(word) for word in launch.command])
            + encode_list(mapping({**prepared.environment, **run.placeholders}))
            + encode_list([os.fsencode(launch.directory)])
        )

    # --- further commands, control ------------------------------------------------------------

    def execute(  # noqa: PLR0913  # a request's parts, as they came
        self, fields: dict[str, str], words: list[bytes], environment: list[bytes], link: Any,
        descriptors: tuple[int, ...], on_close: Callable[[Any], None],
    ) -> None:  # fmt: skip
        """Run another command in a living sandbox: same filter, mounts and environment, so never weaker.

        Raises:
            UsageError: no such run, or it is over.
            RetryError: it is not there yet.
        """
        run = self._runs[self._living(fields.get("run", ""))]
        if run.go:
            raise RetryError("run-starting", "the run is still starting", where=run.plan.run, remedy="the same again")
        if run.live.status == "ending":  # its sessions are told already: nobody would answer this one
            raise UsageError("run-not-alive", f"the run {run.plan.run} is ending", remedy="cloister ps")
        launch = run.plan.launch
        terminal = [item for item in environment if item.startswith((b"TERM=", b"COLORTERM=", b"LANG="))]
        command = Command(
            words=words or [b"/bin/sh"],
            environment=[*terminal, *mapping(launch.environment | self._provisions.placeholders(run))],
            directory=fields.get("directory") or launch.directory,
            pty=bool(fields.get("pty")),
        )
        run.attach(link, command, descriptors[:3], on_close)

    def control(self, verb: str, fields: dict[str, str]) -> dict[str, Any]:
        """Answer a control request.

        Raises:
            UsageError: an unknown verb or run.
        """
        match verb:
            case "stop":
                name = self._living(fields.get("run", ""))
                self._stop(name, float(fields.get("grace") or 10))
                return {"run": name, "stopping": True}
            case "llm-blocked":
                return {"ended": self._provisions.obey_blocks()}
            case "metrics":
                return {"runs": len(self._runs), "models": msgspec.to_builtins(self._provisions.metrics())}
            case "image-allow-older":
                from cloister.runs.image_older import allow_older

                return allow_older(self._kitchen, self._audit, fields)
            case "reload":
                return {"reloaded": self._reload()}
            case "living":
                return {"runs": sorted(self._names()), "pid": os.getpid()}
            case _:
                raise UsageError(
                    "request-unknown", f"the broker knows no request {verb!r}", remedy="cloister stop; then retry"
                )

    def _names(self) -> Iterable[str]:
        """Return the ids of all runs that live."""
        return self._runs

    def _living(self, prefix: str) -> str:
        """Return the id of the one living run that a person means."""
        names = list(self._names())
        found = [name for name in names if prefix and name.startswith(prefix)]
        if prefix == "last" and names:
            found = [max(names)]
        if len(found) != 1:
            raise UsageError("run-not-alive", f"no running run with the id {prefix!r}", remedy="cloister ps")
        return found[0]

    def _stop(self, name: str, grace_s: float) -> None:
        self._runs[name].live.stop(grace_s)

    def _reload(self) -> list[dict[str, str]]:
        """Bring the policy as it is now to every living run; a broken policy changes nothing."""
        results = []
        for name, run in self._runs.items():
            try:
                revoked = self._provisions.reload(run, self._kitchen)
            except CloisterError as error:
                results.append({"run": name, "error": error.message})
                continue
            run.write_event("policy-reloaded", {"digest": self._kitchen.policies.digest})
            if self._kitchen.filter_outdated(run.plan):
                results.append({"run": name, "error": FILTER_OUTDATED})
                continue
            named = {"revoked": ", ".join(revoked)} if revoked else {}
            results.append({"run": name, "policy": self._kitchen.policies.digest, **named})
        return results

    # --- endings --------------------------------------------------------------------------------

    def _ended(self, run: ActiveRun, outcome: Outcome) -> None:
        """Begin the ending; nothing lives in the sandbox any more."""
        task = self._loop.create_task(self._end(run, outcome))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _end(self, run: ActiveRun, outcome: Outcome) -> None:
        """Close its connections, undo the plan, look at the workspace, write the receipt, in this order."""
        outcome = await self._leave(run, outcome)
        warnings = await self._provisions.end(run)
        try:
            if run.egress:
                await asyncio.wait_for(run.egress.close(), CLOSE_EGRESS_S)
        except TimeoutError:
            run.write_event("warning", {"what": "egress connections did not close in time"})
        finally:
            host_apply.undo(run.plan, self._paths.state)
        found = await self._look_after(run)
        warnings = (
            *said_aloud(run.plan.notices),
            *run.limits_reached,
            *unrecorded(run),
            *self._provisions.left(run.plan.run),
            *found,
            *warnings,
        )
        receipt = run.conclude(outcome, warnings)
        self._audit.over(run, receipt)
        warnings = await self._take_leave(run, receipt)
        self._runs.pop(run.plan.run, None)
        self._one_ended.set()
        run.say_goodbye(outcome, warnings)

    async def _leave(self, run: ActiveRun, outcome: Outcome) -> Outcome:
        """End what holds the sandbox, where its first process did not take that along; return how the run ended."""
        del run
        return outcome

    async def _look_after(self, run: ActiveRun) -> tuple[str, ...]:
        """Return what the receipt should say of the workspace."""
        del run
        return ()

    async def _take_leave(self, run: ActiveRun, receipt: Receipt) -> tuple[str, ...]:
        """Tell others how it ended, before the caller is told; return what is said to the caller."""
        del run
        return receipt.warnings

    def recover(self) -> None:
        """Undo what the runs of a killed broker left, and give each a receipt that says so."""
        for run in self._store.ids():
            record = self._store.record(run)
            if record is not None and record.status == "finished":
                continue
            plan = self._store.plan(run)
            if plan is None:
                self._store.remove(run)  # killed before its plan was complete: nothing was applied
                continue
            self._undo_left(plan)
            self._provisions.recover(plan)
            closed, receipt = broken_off(plan, record)
            self._store.finish(closed, receipt)
            self._audit.broken_off(plan, closed, closed.user or self._kitchen.owner.name)

    def _undo_left(self, plan: Plan) -> None:
        """Undo a plan of a killed broker."""
        host_apply.undo(plan, self._paths.state)

    async def close(self) -> None:
        """End every run, politely for two seconds; what is asked for a login comes to its end."""
        for run in list(self._runs.values()):
            run.live.stop(1.0)
        await self._wait_empty(3.0)
        for run in list(self._runs.values()):
            run.live.outer_closed()
        await self._wait_empty(3.0)
        await self._provisions.close()
        await self._loop.run_in_executor(None, self._audit.close)

    async def _wait_empty(self, seconds: float) -> None:
        while self.busy:
            self._one_ended.clear()
            try:
                await asyncio.wait_for(self._one_ended.wait(), seconds)
            except TimeoutError:
                return


def broken_off(plan: Plan, record: Record | None, warning: str = "") -> tuple[Record, Receipt]:
    """Return record and receipt of a run whose broker was killed; `warning` says what is lost by that."""
    now = time.time()
    known = record or Record(
        id=plan.run, agent=plan.agent, workspace=plan.workspace, command=plan.asked, status="starting",
        started=now, broker_pid=0,
    )  # fmt: skip
    closed = msgspec.structs.replace(known, status="finished", finished=now, exit_code=125, reason="broker-died")
    lost = warning or "the broker was killed; counts were lost with it, the events up to then are in the log"
    receipt = Receipt(
        id=plan.run, agent=plan.agent, preset=plan.preset, isolation=plan.isolation, workspace=plan.workspace,
        command=known.command, started=known.started, finished=now, exit_code=125, reason="broker-died",
        policy_digest=plan.policy_digest, plan_digest=plan.digest(), host={}, probe=(), limits=plan.limits,
        opt_outs=plan.opt_outs, notices=plan.notices, connections=0, denials=0, bytes_up=0, bytes_down=0, denied=(),
        warnings=(lost,),
    )  # fmt: skip
    return closed, receipt
