"""The runs of one user: starting them in sandboxes of their own, or asking for units of the system.

    prepare → ask about the environment → store the plan → apply → serve egress → hand over to the shim

Each step leaves the store and the host such that `recover` of the next broker can finish the job.
"""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from cloister.egress import nft
from cloister.errors import CloisterError, RetryError, UsageError
from cloister.host import apply as host_apply
from cloister.host.frames import encode_list
from cloister.host.memory_file import memory_file
from cloister.host.owner import Owner
from cloister.host.stranded import end_stranded
from cloister.isolation import seccomp
from cloister.plan.steps import Plan
from cloister.runs import vm_workspace
from cloister.runs.active import FLAG_NETNS, FLAG_PATIENT, FLAG_PTY, FLAG_USERNS, ActiveRun
from cloister.runs.attach import Attachment
from cloister.runs.confine import confiner
from cloister.runs.detached import detach, detached_stdio
from cloister.runs.links import Connect
from cloister.runs.live import Outcome
from cloister.runs.paths import Paths
from cloister.runs.prepare import Kitchen, Looked, Prepared
from cloister.runs.protections import Protections, look_after
from cloister.runs.provisions import Provided
from cloister.runs.request import RunRequest
from cloister.runs.starter import Starter
from cloister.runs.store import Record
from cloister.runs.supervision import Supervision
from cloister.runs.upstream import upstream_proxy

if TYPE_CHECKING:
    from cloister.runs.unit_client import UnitRuns
    from cloister.runs.unit_run import UnitRun
    from cloister.runs.vm_run import Guest
    from cloister.runs.vm_tried import Tried

NFT_LOAD = ("-f", "/dev/fd/5")
"""5 is the third descriptor of the frame (`plan.steps.Launch`)."""
_SHARING = "shared-memory"
"""The filter of a monitor that shares its guest's memory with others."""
NFT_REPORT = ("-j", "list", "table", "inet", nft.TABLE)


class Supervisor(Supervision):
    """The runs of one user."""

    def __init__(self, loop: asyncio.AbstractEventLoop, paths: Paths, owner: Owner, connect: Connect) -> None:
        """Know where things are; start nothing."""
        super().__init__(loop, Kitchen(paths, owner), connect)
        self._protections = Protections(loop, self._touched)
        self._units: UnitRuns | None = None
        self._tried: Tried | None = None
        self._filters: dict[str, bytes] = {}

    @property
    def busy(self) -> bool:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Whether any run is alive."""
        return bool(self._runs) or bool(self._units and self._units.busy)

    def _system_units(self) -> UnitRuns:
        """Return what asks the system for runs; nothing of it is imported before the first one."""
        if self._units is None:
            from cloister.runs.unit_client import UnitRuns

            self._units = UnitRuns(self._loop, self._kitchen, self._connect, self._protections, self._one_ended.set)
        return self._units

    def _unit(self, name: str) -> UnitRun | None:
        return self._units.find(name) if self._units else None

    # --- starting ---------------------------------------------------------------------------

    async def start(
        self, request: RunRequest, link: Any, stdio: tuple[int, ...], on_close: Callable[[Any], None]
    ) -> None:
        """Start a run whose outer half is behind `link`, and whose caller has these standard streams.

        Raises:
            CloisterError: nothing was started, and everything is as before.
        """
        try:
            await self._start(request, link, stdio, on_close)
        except CloisterError as error:
            self._audit.refused(request.agent, self._kitchen.owner.name, error)
            raise

    async def _prepare(self, request: RunRequest, looked: Looked, stderr: int) -> Prepared:
        """Prepare the run; what has to be tried by booting a guest is tried beside the loop, which carries others."""
        if looked.agent.isolation == "microvm":
            if self._tried is None:
                from cloister.runs.vm_tried import Tried

                self._tried = Tried(self._loop, self._kitchen)
            looked = looked._replace(machine=await self._tried.machine(looked, stderr))
        return self._kitchen.prepare(request, request.run, looked)

    async def _start(
        self, request: RunRequest, link: Any, stdio: tuple[int, ...], on_close: Callable[[Any], None]
    ) -> None:
        if request.run:
            self._store.reserve(request.run)
        looked = self._kitchen.look(request)
        if looked.agent.isolation == "unit":
            await self._system_units().start(request, looked, link, stdio)
            return
        self._audit.admit()
        prepared = await self._prepare(request, looked, stdio[2])
        upstream = upstream_proxy(prepared.agent.egress.upstream_proxy, os.environ)
        await self._confirm(prepared, request, link, on_close)
        plan, started = prepared.plan, time.time()
        provided = await self._provisions.open(prepared, request, started)
        record = Record(
            id=plan.run, agent=plan.agent, workspace=plan.workspace, command=plan.asked, status="starting",
            started=started, broker_pid=os.getpid(), detached=request.detach, mode=prepared.agent.workspace.mode,
        )  # fmt: skip
        guest = self._guest(prepared)
        applied = await self._set_up(provided, prepared, guest, record, (link, request.json))
        outer, pid = link, link.peer_pid
        if request.detach:
            outer, pid = detach(self._loop, self._connect, self._store.output_path(plan.run), pid)
        run, theirs = self._run(prepared, record, outer)
        run.outer_pid, run.guest = pid, guest
        self._audit.began(run, self._kitchen.policies.digest, self._kitchen.owner.name)
        self._provisions.attach(provided, run)
        run.starter = Starter(link, os.dup(stdio[1]), request.json) if request.detach else None
        if guest and not plan.launch.pty:  # its keeper hands them on: the guest has no descriptor of ours
            run.stdio = detached_stdio(self._store.output_path(plan.run)) if request.detach else _copies(stdio)
        run.confine = None if guest else confiner(self._loop, run)  # a guest's monitor is held before it starts
        self._runs[plan.run] = run
        self._attach(run)

        def outer_closed(closed: Any) -> None:
            run.live.outer_closed()
            on_close(closed)

        outer.rebind(lambda _, frame: run.outer_frame(frame), outer_closed)
        await self._provisions.serve(run, prepared, applied, upstream)
        self._watch(run)
        self._launch(run, prepared, theirs)

    def _guest(self, prepared: Prepared) -> Guest | None:
        """Return the virtual machine of a run that has one; nothing of it is imported before the first."""
        if not prepared.plan.launch.vm:
            return None
        from cloister.runs.vm_run import Guest

        return Guest(self._loop, self._paths, prepared)

    async def _set_up(
        self, provided: Provided, prepared: Prepared, guest: Guest | None, record: Record, caller: tuple[Any, bool]
    ) -> host_apply.Applied:
        """Store and apply the plan; with a guest, verify its image before and make its disks behind that.

        The caller is his link, and whether he is told nothing but the answer (`--json`).

        Raises:
            CloisterError: nothing is left of it.
        """
        plan, (link, quiet) = prepared.plan, caller
        if guest is None:
            return self._apply(provided, plan, record, link)
        try:
            await guest.verify()
            applied = self._apply(provided, plan, record, link)
        except BaseException:
            guest.drop()
            raise
        try:
            await guest.make_disks(link, quiet=quiet)
            if link.closed:
                raise UsageError("not-started", "whoever asked for the run went away before it started")  # noqa: TRY301
        except BaseException:
            applied.close()
            guest.drop()
            host_apply.undo(plan, self._paths.state)
            await self._provisions.withdraw(provided, plan)
            self._store.remove(plan.run)
            raise
        return applied

    def _attach(self, run: ActiveRun) -> None:
        """Get ready to connect the run's own network, in mode `internet`."""
        if run.plan.launch.pasta:
            run.network = Attachment(
                self._loop, run.plan.launch.pasta, self._paths.run_runtime(run.plan.run),
                on_ready=lambda pidfd: run.outer.send("G", b"", (pidfd,)), on_failed=run.live.network_failed,
            )  # fmt: skip

    def _run(self, prepared: Prepared, record: Record, outer: Any) -> tuple[ActiveRun, socket.socket]:
        """Return the run, which nobody knows yet, and the end of its channel that is the inner half's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        holder: list[ActiveRun] = []
        inner = self._connect(ours, lambda _, frame: holder[0].inner_frame(frame), lambda _: holder[0].inner_closed())
        run = ActiveRun(
            prepared.plan, record, self._store, (outer, inner), self._loop.call_later, self._ended,
            _host_words(prepared),
        )  # fmt: skip
        run.layout = None if prepared.plan.launch.vm else prepared.layout  # a guest has a copy, on a disk of its own
        holder.append(run)
        return run, theirs

    def _launch(self, run: ActiveRun, prepared: Prepared, theirs: socket.socket) -> None:
        """Send the outer half what it needs; the inner one gets its part when its self-probe has passed."""
        launch = run.plan.launch
        run.go = (run.guest.order(run) if run.guest else b"") or self._go(run, prepared)
        flags = (FLAG_PTY if launch.pty else 0) | (FLAG_USERNS if launch.overlays else 0)
        flags |= FLAG_USERNS | FLAG_NETNS if launch.ruleset else 0
        flags |= FLAG_PATIENT if launch.vm else 0
        overlays = [
            os.fsencode(part) for one in launch.overlays for part in (one.lower, one.upper, one.work, one.target)
        ]
        payload = (
            flags.to_bytes(4, "little")
            + encode_list([os.fsencode(word) for word in launch.argv])
            + encode_list(overlays)
            + encode_list([os.fsencode(word) for word in (launch.nft, *NFT_LOAD)] if launch.ruleset else [])
            + encode_list([os.fsencode(word) for word in (launch.nft, *NFT_REPORT)] if launch.ruleset else [])
            + encode_list([os.fsencode(part) for one in launch.holds for part in (one.mode, one.source, one.target)])
        )
        # The agent's own filter is loaded in the guest; the monitor's is the one that no policy has made wider.
        profile = launch.seccomp if not launch.vm else _SHARING if launch.vm.template else ""
        files = [memory_file("seccomp", self._filter(profile))]
        files += [memory_file("ruleset", launch.ruleset.encode())] if launch.ruleset else []
        machine = run.guest.descriptors if run.guest else ()
        run.outer.send("B", payload, (files[0], theirs.fileno(), *files[1:], *machine))
        for descriptor in files:
            os.close(descriptor)
        theirs.close()
        if run.guest:
            run.guest.begin(run)

    def _filter(self, profile: str) -> bytes:
        if profile not in self._filters:
            words = profile.split(",")
            self._filters[profile] = seccomp.assemble(
                platform.machine(),
                nested="nested" in words,
                ptrace="ptrace" in words,
                netlink="netlink" in words,
                listeners="listeners" in words,
            )
            if profile == _SHARING:
                from cloister.isolation.discards import pretended

                self._filters[profile] = pretended(platform.machine(), self._filters[profile])
        return self._filters[profile]

    # --- further commands, control ------------------------------------------------------------

    def execute(  # type: ignore[explicit-override]  # noqa: PLR0913  # a request's parts, as they came
        self, fields: dict[str, str], words: list[bytes], environment: list[bytes], link: Any,
        descriptors: tuple[int, ...], on_close: Callable[[Any], None],
    ) -> None:  # fmt: skip
        """Run another command in a living sandbox: same filter, mounts and environment, so never weaker.

        Raises:
            UsageError: no such run, or it is over.
            RetryError: it is not there yet.
        """
        name = self._living(fields.get("run", ""))
        if unit := self._unit(name):
            unit.execute(fields, words, environment, link, descriptors)
            return
        super().execute({**fields, "run": name}, words, environment, link, descriptors, on_close)

    def _machine(self, fields: dict[str, str]) -> tuple[ActiveRun, Guest]:
        run = self._runs[self._living(fields.get("run", ""))]
        if run.guest is None:
            raise UsageError("vm-not", f"the run {run.plan.run} has no virtual machine", remedy="cloister vm list")
        if run.live.status != "running":
            raise RetryError(
                "run-starting", "the run is starting or ending", where=run.plan.run, remedy="the same again"
            )
        return run, run.guest

    async def figures(self, fields: dict[str, str]) -> dict[str, Any]:
        """Return what the guest of a living run says of itself.

        Raises:
            CloisterError: there is no such run, it has no machine, or that does not answer.
        """
        run, guest = self._machine(fields)
        return {"run": run.plan.run, "figures": await guest.figures(run)}

    async def snapshot(self, fields: dict[str, str]) -> dict[str, Any]:
        """Keep a living run's machine under a name: its disks, and its memory unless only those are asked for.

        Raises:
            CloisterError: there is no such run, it has no machine, or that could not be kept.
        """
        run, guest = self._machine(fields)
        why = "" if fields.get("disks") else guest.memoryless(run)
        memory = not (why or fields.get("disks"))
        placeholders = self._provisions.placeholders(run)
        kept = await guest.snapshot(run, fields.get("name", ""), placeholders, memory=memory)
        run.write_event("snapshot", {"name": kept.name, "paused_s": kept.paused_s, "memory": memory})
        return {"run": run.plan.run, "name": kept.name, "paused_s": kept.paused_s, "memory": memory, "why": why}

    def _names(self) -> Iterable[str]:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        return (*self._runs, *(self._units.names() if self._units else ()))

    def _stop(self, name: str, grace_s: float) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        if unit := self._unit(name):
            unit.stop(grace_s)
        else:
            super()._stop(name, grace_s)

    # --- endings --------------------------------------------------------------------------------

    def _watch(self, run: ActiveRun) -> None:
        """Have the run ended when the host takes a protection away; see host/watch.py."""
        if run.layout is None or run.record.mode == "overlay":
            return
        if warning := self._protections.add(run.plan.run, run.layout):
            run.write_event("warning", {"what": warning})

    def _touched(self, name: str) -> None:
        """Something protected changed on the host: the run looks whether its mounts still hold."""
        if run := self._runs.get(name):
            run.protection_lost()
        elif unit := self._unit(name):
            unit.protection_touched()

    async def _leave(self, run: ActiveRun, outcome: Outcome) -> Outcome:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        self._protections.remove(run.plan.run)
        if run.network:
            run.network.close()
        if run.guest:
            run.guest.ended()
        if not run.live.probe:  # its first process never spoke: it may wait for a bubblewrap that was killed
            outer = run.outer_pid if outcome.reason == "client-died" else 0
            await self._loop.run_in_executor(None, end_stranded, run.plan.run, run.plan.launch.argv, outer)
        return outcome

    async def _look_after(self, run: ActiveRun) -> tuple[str, ...]:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        if run.guest:
            return await run.guest.finish(run.record.started, run.outer)
        if run.record.mode == "overlay" or run.layout is None:
            return ()  # overlays are reviewed anyway
        return await self._loop.run_in_executor(None, look_after, run.layout, run.record.started)

    def _undo_left(self, plan: Plan) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        if plan.launch.unit:
            self._system_units().wait_and_undo(plan)
            return
        end_stranded(plan.run, plan.launch.argv)
        super()._undo_left(plan)
        if plan.launch.vm:
            vm_workspace.tidy(self._paths.run_state(plan.run))

    async def close(self) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """End every run, politely for two seconds; what is asked for a login comes to its end."""
        if self._units:
            self._units.stop_all()
        await super().close()
        if self._units:
            self._units.close()


def _copies(descriptors: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(os.dup, descriptors[:3]))


def _host_words(prepared: Prepared) -> dict[str, object]:
    facts, vm = prepared.host, prepared.plan.launch.vm
    machine = {"image": f"{vm.image} {vm.version}", "manifest": vm.manifest, "monitor": vm.monitor,
               "accelerator": vm.accelerator} if vm else {}  # fmt: skip
    return {
        **machine,
        "kernel": facts.kernel,
        "bubblewrap": facts.bwrap.path,
        "landlock_abi": facts.landlock_abi,
        "arch": facts.arch,
    }
