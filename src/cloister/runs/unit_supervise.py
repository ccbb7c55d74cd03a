"""The runs of the system's broker: units that `cloister-hostd` makes, each for a user who holds its lease.

    hostd asks ─▶ prepare ─▶ ask the person ─▶ store ─▶ apply ─P─▶ hostd makes the unit ─S─▶ serve ─▶ probe ─▶ go
                                                                                  └──F──▶ undo, refused

The agent's end, a closed lease or a closed outer link all end the run; hostd stops the unit and undoes its part before
ours is undone. What happens is told over the lease (`unit_words`), for the user's own records.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec

from cloister.errors import CloisterError, RetryError, StepError, UsageError
from cloister.host import apply as host_apply
from cloister.host.frames import Frame, encode_list
from cloister.plan.steps import Plan
from cloister.runs.active import FLAG_PTY, ActiveRun
from cloister.runs.gateway_serve import GatewayKitchen, Gateways
from cloister.runs.hostd import Hostd
from cloister.runs.links import Connect, Link
from cloister.runs.live import Outcome
from cloister.runs.prepare import Prepared
from cloister.runs.provisions import Provided
from cloister.runs.store import Receipt, Record
from cloister.runs.supervision import Supervision
from cloister.runs.unit_asked import Asked
from cloister.runs.unit_ends import explain_end, limits_reached, told, without
from cloister.runs.unit_lease import Lease
from cloister.runs.unit_network import UnitNetwork
from cloister.runs.unit_prepare import UnitKitchen
from cloister.runs.unit_words import Told
from cloister.runs.upstream import upstream_proxy

UNIT_S = 120.0
"""Time in which hostd must have made the unit, or said why not."""
RUNS_PER_USER = 128
"""So that nobody uses up what all share here: descriptors, memory, the loop."""
CLOSING_WORDS_S = 30.0
"""Time in which the user's broker looks at the workspace, however large."""


class Parties(NamedTuple):
    """Who takes part in a start: hostd's connection, the caller's outer half, the lease, and the agent's streams."""

    hostd: Link
    outer: Link
    lease: Lease
    stdio: tuple[int, ...]


class Stood(msgspec.Struct, frozen=True, kw_only=True):
    """What hostd says of a unit that stands (`S`)."""

    unit: str
    invocation: str = ""
    verified: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    """Limits, by the property's name, that the kernel does not keep."""


class UnitSupervisor(Supervision):
    """The runs under systemd of one host."""

    SOURCE = "proxyd"

    def __init__(self, loop: asyncio.AbstractEventLoop, kitchen: UnitKitchen, connect: Connect, hostd: Hostd) -> None:
        """Know where things are; start nothing."""
        super().__init__(loop, kitchen, connect)
        self._units = kitchen
        self.gateways = Gateways(loop, GatewayKitchen(kitchen.paths, kitchen.owner), self._provisions, self._audit)
        self._audit.watching = lambda: bool(self._runs) or self.gateways.busy
        self._hostd = hostd
        self._leases: dict[str, Lease] = {}
        self._networks: dict[str, UnitNetwork] = {}
        self._ends: dict[str, dict[str, Any]] = {}

    # --- starting ---------------------------------------------------------------------------

    async def start(self, asked: Asked, parties: Parties) -> None:
        """Start a run; returns when it lives.

        Raises:
            CloisterError: nothing was started, and everything of ours is as before.
        """
        request = asked.request
        if request.run:
            self._store.reserve(request.run)
        if self._units.count(asked.account.user) >= RUNS_PER_USER:
            message = f"{asked.account.user} has {RUNS_PER_USER} runs under systemd already"
            raise RetryError("runs-too-many", message, remedy="cloister stop RUN")
        self._audit.admit()
        prepared = self._units.prepare_unit(asked)
        upstream = upstream_proxy(prepared.agent.egress.upstream_proxy, os.environ)
        await self._confirm(prepared, request, parties.outer, lambda _: None)
        plan, started = prepared.plan, time.time()
        # `env:` of a secret is our environment, never the caller's.
        ours = msgspec.structs.replace(request, environment=dict(os.environ))
        provided = await self._provisions.open(prepared, ours, started)
        record = Record(
            id=plan.run, agent=plan.agent, workspace=plan.workspace, command=plan.asked, status="starting",
            started=started, broker_pid=os.getpid(), detached=request.detach, user=asked.account.user,
        )  # fmt: skip
        self._units.remember(plan.run, asked)
        try:
            applied = self._apply(provided, plan, record, parties.outer)
        except BaseException:
            self._units.forget(plan.run)
            raise
        try:
            stood, channel, network = await self._unit(plan, parties)
        except BaseException:
            applied.close()
            await self._withdraw(plan, record, provided)
            raise
        run = self._run(prepared, record, provided, parties, stood, channel)
        if network >= 0:
            run.network = self._networks[plan.run] = UnitNetwork(self._connect, network, run.live.network_failed)
        await self._provisions.serve(run, prepared, applied, upstream)
        run.make_ready()

    def _run(  # noqa: PLR0913  # made in one place, of what the start has brought
        self, prepared: Prepared, record: Record, provided: Provided, parties: Parties, stood: Stood, channel: int
    ) -> ActiveRun:
        """Return the living run: from here on it ends by itself, whatever fails."""
        plan, lease, outer = prepared.plan, parties.lease, parties.outer
        holder: list[ActiveRun] = []
        inner = self._connect(
            socket.socket(fileno=channel),
            lambda _, frame: holder[0].inner_frame(frame),
            lambda _: holder[0].inner_closed(),
        )
        words = {"kernel": prepared.host.kernel, "arch": prepared.host.arch, "landlock_abi": prepared.host.landlock_abi,
                 "unit": stood.unit, "invocation": stood.invocation, "verified": "; ".join(stood.verified)}  # fmt: skip
        limits, lost = without(plan.limits, stood.lacking)
        noticed = msgspec.structs.replace(plan, limits=limits, notices=(*plan.notices, *stood.notices, *lost))
        run = ActiveRun(noticed, record, self._store, (outer, inner), self._loop.call_later, self._ended, words)
        holder.append(run)
        run.ready = False
        run.stdio = tuple(os.dup(descriptor) for descriptor in parties.stdio)
        run.told = lease.tell
        account = plan.launch.unit.account if plan.launch.unit else ""
        self._audit.began(run, self._kitchen.policies.digest, record.user, account)
        self._provisions.attach(provided, run)
        run.go = self._go(run, prepared)
        self._runs[plan.run] = run
        self._leases[plan.run] = lease
        lease.serve(run, partial(self.execute, on_close=lambda _: None))
        outer.rebind(lambda _, frame: run.outer_frame(frame), lambda _: run.live.outer_closed())
        flags = FLAG_PTY if plan.launch.pty else 0
        outer.send("B", flags.to_bytes(4, "little") + encode_list([]) * 2)  # it has nothing to start, only to relay
        lease.say(Told(run=noticed))
        if outer.closed or lease.closed:
            run.live.outer_closed()
        return run

    async def _unit(self, plan: Plan, parties: Parties) -> tuple[Stood, int, int]:
        """Have hostd make the unit; return what it says, the shim's channel, and that of the network's unit or -1.

        Raises:
            CloisterError: the unit did not come to be.
        """
        answer: asyncio.Future[Frame] = self._loop.create_future()

        def on_frame(_: Any, frame: Frame) -> None:
            if answer.done():
                _close_all(frame.descriptors)
            else:
                answer.set_result(frame)

        def on_close(_: Any) -> None:
            if not answer.done():
                answer.set_exception(RetryError("hostd-gone", "cloister-hostd went away", remedy="try again"))

        parties.hostd.rebind(on_frame, on_close)
        parties.hostd.send("P", msgspec.json.encode(plan))
        parties.lease.leads = True
        try:
            frame = await asyncio.wait_for(answer, UNIT_S)
        except TimeoutError:
            raise RetryError("unit-slow", f"the unit did not come up within {UNIT_S:g} s") from None
        if frame.kind == "F":
            _close_all(frame.descriptors)
            raise PassedError(frame.payload)
        channel, network, *rest = _placed(frame.descriptors, with_network=bool(plan.launch.pasta))
        whole = channel >= 0 and (network >= 0 or not plan.launch.pasta)
        _close_all(tuple(rest))  # a pidfd of the first process, whose channel tells of its end as well
        try:
            stood = msgspec.json.decode(frame.payload, type=Stood) if frame.kind == "S" and whole else None
        except msgspec.DecodeError:
            stood = None
        if stood is None:
            _close_all(tuple(one for one in (channel, network) if one >= 0))
            raise StepError("hostd-malformed", f"what cloister-hostd said of the unit is not understood ({frame.kind})")
        return stood, channel, network

    async def _withdraw(self, plan: Plan, record: Record, provided: Provided) -> None:
        """Undo our part of a run that has no unit, and have hostd undo what it may have begun."""
        with contextlib.suppress(CloisterError):
            await self._hostd.end(plan.run)
        await self._provisions.withdraw(provided, plan)
        host_apply.undo(plan, self._paths.state)
        self._units.forget(plan.run)
        self._store.remove(record.id)

    def _reload(self) -> list[dict[str, str]]:  # type: ignore[explicit-override]  # Python 3.12
        """Bring the policy to every run, and end those that it does not allow any more."""
        for name, run in list(self._runs.items()):
            try:
                why = self._units.refused_now(name)
            except CloisterError:
                continue  # a broken policy changes nothing; what follows says so of each run
            if why:
                run.live.refuse("grant-revoked", "the system's policy does not allow this run any more", [why])
        return super()._reload()

    # --- endings ----------------------------------------------------------------------------

    async def _leave(self, run: ActiveRun, outcome: Outcome) -> Outcome:  # type: ignore[explicit-override]  # Python 3.12
        """Have hostd stop the unit and undo its mounts; systemd's word on how it ended may explain it."""
        try:
            end = await self._hostd.end(run.plan.run)
        except CloisterError as error:
            run.write_event("warning", {"what": error.message})
            run.limits_reached = (*run.limits_reached, f"{error.message} [hostd-silent]")
            return outcome
        finally:
            if network := self._networks.pop(run.plan.run, None):
                await network.finish()
        run.limits_reached = (*run.limits_reached, *limits_reached(end))
        peak: dict[str, object] = {"memory_peak": run.memory_peak} if run.memory_peak else {}
        run.host = {**run.host, **peak, **told(end)}
        return explain_end(outcome, end)

    async def _take_leave(self, run: ActiveRun, receipt: Receipt) -> tuple[str, ...]:  # type: ignore[explicit-override]  # Python 3.12
        """Let the user's broker keep the receipt and look at the workspace, before the caller is told the end."""
        lease = self._leases.pop(run.plan.run, None)
        self._units.forget(run.plan.run)
        if lease is None:
            return receipt.warnings
        if run.plan.models:
            used = await self._provisions.models_used(run)
            receipt = msgspec.structs.replace(receipt, model_use=used)
        found = await lease.finish(receipt, CLOSING_WORDS_S)
        return (*found, *receipt.warnings)

    async def close(self) -> None:  # type: ignore[explicit-override]  # Python 3.12
        """End gateways' part here, and every run."""
        await self.gateways.close()
        await super().close()

    def on_audit(self, changed: Callable[[], None]) -> None:
        """Have it said when nothing can be recorded any more, and when it can be again."""
        self._audit.on_change = changed

    async def recover_units(self) -> None:
        """Have hostd undo every unit that no living run of ours has."""
        await self._hostd.recover(tuple(self._runs))


class PassedError(Exception):
    """hostd's refusal, to be handed on to the caller as it came."""

    def __init__(self, payload: bytes) -> None:
        """Keep the payload of its `F`."""
        super().__init__("refused by hostd")
        self.payload = payload


def check_parties(descriptors: tuple[int, ...]) -> None:
    """Refuse a request that did not bring outer link, lease and three streams.

    Raises:
        UsageError: so it is.
    """
    if len(descriptors) != len(("outer", "lease", "input", "output", "error")):
        raise UsageError("request-malformed", f"{len(descriptors)} descriptors came with a request for a run")


def _placed(descriptors: tuple[int, ...], *, with_network: bool) -> tuple[int, ...]:
    """Return the shim's channel, that of the network's unit, and the rest of an `S`; -1 for what did not come."""
    channel, *rest = descriptors or (-1,)
    return (channel, rest.pop() if with_network and rest else -1, *rest)


def _close_all(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
