"""All runs of one user: starting them, finding them again, ending them. The broker's whole meaning.

    prepare → ask about the environment → store the plan → apply → serve egress → hand over to the shim

Each step leaves the store and the host such that `recover` of the next broker can finish the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from cloister.egress import nft
from cloister.errors import CloisterError, RetryError, UsageError
from cloister.host import apply as host_apply
from cloister.host import tripwires
from cloister.host.frames import Frame, encode_list
from cloister.host.owner import Owner
from cloister.host.stranded import end_stranded
from cloister.host.watch import Watch
from cloister.isolation import seccomp
from cloister.plan.steps import Plan
from cloister.policy.protected import protected_names
from cloister.runs import audit_environment
from cloister.runs.active import FLAG_NETNS, FLAG_PTY, FLAG_USERNS, ActiveRun, Command, Starter
from cloister.runs.attach import Attachment
from cloister.runs.confine import confiner
from cloister.runs.live import Outcome
from cloister.runs.paths import Paths
from cloister.runs.prepare import SHIM, Kitchen, Prepared, mapping
from cloister.runs.provisions import Provided, Provisions
from cloister.runs.request import RunRequest
from cloister.runs.store import Receipt, Record, Store
from cloister.runs.upstream import upstream_proxy

CLOSE_EGRESS_S = 2.0
FILTER_OUTDATED = (
    "its proxy obeys the new policy, its direct connections obey that of its start: end the run and start it again"
)
NFT_LOAD = ("-f", "/dev/fd/5")
"""5 is the third descriptor of the frame (`plan.steps.Launch`)."""
NFT_REPORT = ("-j", "list", "table", "inet", nft.TABLE)


class Connect(Protocol):
    """How to make a link from a socket."""

    def __call__(
        self, sock: socket.socket, on_frame: Callable[[Any, Frame], None], on_close: Callable[[Any], None]
    ) -> Any:
        """Return the link."""


class Supervisor:
    """The runs of one user."""

    def __init__(self, loop: asyncio.AbstractEventLoop, paths: Paths, owner: Owner, connect: Connect) -> None:
        """Know where things are; start nothing."""
        self._loop = loop
        self._paths = paths
        self._connect = connect
        self._kitchen = Kitchen(paths, owner)
        self._store = Store(paths.runs)
        self._runs: dict[str, ActiveRun] = {}
        self._provisions = Provisions(loop, self._kitchen, self._runs.values)
        self._protected: Watch | None = None
        self._endings: set[asyncio.Task[None]] = set()
        self._one_ended = asyncio.Event()
        self._filters: dict[str, bytes] = {}

    @property
    def busy(self) -> bool:
        """Whether any run is alive."""
        return bool(self._runs)

    # --- starting ---------------------------------------------------------------------------

    async def start(self, request: RunRequest, link: Any, output: int, on_close: Callable[[Any], None]) -> None:
        """Start a run whose outer half is behind `link`, and whose caller's standard output is `output`.

        Raises:
            CloisterError: nothing was started, and everything is as before.
        """
        if request.run:
            self._store.reserve(request.run)
        prepared = self._kitchen.prepare(request, request.run)
        upstream = upstream_proxy(prepared.agent.egress.upstream_proxy, os.environ)
        await self._confirm(prepared, request, link, on_close)
        plan, started = prepared.plan, time.time()
        provided = await self._provisions.open(prepared, request, started)
        record = Record(
            id=plan.run, agent=plan.agent, workspace=plan.workspace, command=plan.asked, status="starting",
            started=started, broker_pid=os.getpid(), detached=request.detach, mode=prepared.agent.workspace.mode,
        )  # fmt: skip
        applied = self._apply(provided, plan, record, link)
        outer, pid = self._detach(plan) if request.detach else (link, link.peer_pid)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        holder: list[ActiveRun] = []
        inner = self._connect(ours, lambda _, frame: holder[0].inner_frame(frame), lambda _: holder[0].inner_closed())
        run = ActiveRun(
            plan, record, self._store, (outer, inner), self._loop.call_later, self._ended, _host_words(prepared)
        )
        run.layout, run.outer_pid = prepared.layout, pid
        self._provisions.attach(provided, run)
        run.starter = Starter(link, os.dup(output), request.json) if request.detach else None
        run.confine = confiner(self._loop, run)
        holder.append(run)
        self._runs[plan.run] = run
        if plan.launch.pasta:
            run.network = Attachment(
                self._loop, plan.launch.pasta, self._paths.run_runtime(plan.run),
                on_ready=lambda pidfd: outer.send("G", b"", (pidfd,)), on_failed=run.live.network_failed,
            )  # fmt: skip

        def outer_closed(closed: Any) -> None:
            run.live.outer_closed()
            on_close(closed)

        outer.rebind(lambda _, frame: run.outer_frame(frame), outer_closed)
        await self._provisions.serve(run, prepared, applied, upstream)
        self._watch(run)
        self._launch(run, prepared, theirs)

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

    def _launch(self, run: ActiveRun, prepared: Prepared, theirs: socket.socket) -> None:
        """Send the outer half what it needs; the inner one gets its part when its self-probe has passed."""
        launch = run.plan.launch
        run.go = (
            (FLAG_PTY if launch.pty else 0).to_bytes(4, "little")
            + encode_list([os.fsencode(word) for word in launch.command])
            + encode_list(mapping({**prepared.environment, **run.placeholders}))
            + encode_list([os.fsencode(launch.directory)])
        )
        flags = (FLAG_PTY if launch.pty else 0) | (FLAG_USERNS if launch.overlays else 0)
        flags |= FLAG_USERNS | FLAG_NETNS if launch.ruleset else 0
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
        files = [_memory_file("seccomp", self._filter(launch.seccomp))]
        files += [_memory_file("ruleset", launch.ruleset.encode())] if launch.ruleset else []
        run.outer.send("B", payload, (files[0], theirs.fileno(), *files[1:]))
        for descriptor in files:
            os.close(descriptor)
        theirs.close()

    def _filter(self, profile: str) -> bytes:
        if profile not in self._filters:
            words = profile.split(",")
            self._filters[profile] = seccomp.assemble(
                platform.machine(), nested="nested" in words, ptrace="ptrace" in words, netlink="netlink" in words
            )
        return self._filters[profile]

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

    def _detach(self, plan: Plan) -> tuple[Any, int]:
        """Start the outer half ourselves, its output in the store; return its link and pid."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        output = os.open(
            self._store.output_path(plan.run), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        theirs.set_inheritable(True)
        try:
            actions = [
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
            ]
            pid = os.posix_spawn(SHIM, [SHIM, "outer", str(theirs.fileno())], {}, file_actions=actions, setsid=True)
        finally:
            os.close(output)
            os.close(null)
            theirs.close()
        self._reap(pid)
        return self._connect(ours, lambda *_: None, lambda *_: None), pid

    def _reap(self, pid: int) -> None:
        """Collect a detached outer half when it ends."""
        descriptor = os.pidfd_open(pid)

        def ready() -> None:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

        self._loop.add_reader(descriptor, ready)

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
        run = self._living(fields.get("run", ""))
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
                run = self._living(fields.get("run", ""))
                run.live.stop(float(fields.get("grace") or 10))
                return {"run": run.plan.run, "stopping": True}
            case "llm-blocked":
                return {"ended": self._provisions.obey_blocks()}
            case "metrics":
                return {"runs": len(self._runs), "models": msgspec.to_builtins(self._provisions.metrics())}
            case "reload":
                return {"reloaded": self._reload()}
            case "living":
                return {"runs": sorted(self._runs), "pid": os.getpid()}
            case _:
                raise UsageError(
                    "request-unknown", f"the broker knows no request {verb!r}", remedy="cloister stop; then retry"
                )

    def _living(self, prefix: str) -> ActiveRun:
        found = [run for name, run in self._runs.items() if prefix and name.startswith(prefix)]
        if prefix == "last" and self._runs:
            found = [self._runs[max(self._runs)]]
        if len(found) != 1:
            raise UsageError("run-not-alive", f"no running run with the id {prefix!r}", remedy="cloister ps")
        return found[0]

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

    def _watch(self, run: ActiveRun) -> None:
        """Have the run ended when the host takes a protection away; see host/watch.py."""
        if run.layout is None or run.record.mode == "overlay":
            return
        try:
            if self._protected is None:
                self._protected = Watch()
                self._loop.add_reader(self._protected.descriptor, self._touched)
            missed = self._protected.add(
                run.plan.run, (mount.source for mount in run.layout.mounts if mount.op == "ro")
            )
        except OSError:
            missed = 1
        if missed:
            run.write_event("warning", {"what": f"{missed} protected paths cannot be watched for replacement"})

    def _touched(self) -> None:
        """Something protected changed on the host: the runs it concerns look whether their mounts still hold."""
        for name in self._protected.touched() if self._protected else ():
            if run := self._runs.get(name):
                run.protection_lost()

    async def _end(self, run: ActiveRun, outcome: Outcome) -> None:
        """Close its connections, undo the plan, look at the workspace, write the receipt, in this order."""
        if self._protected:
            self._protected.remove(run.plan.run)
        if run.network:
            run.network.close()
        warnings = await self._provisions.end(run)
        if not run.live.probe:  # its first process never spoke: it may wait for a bubblewrap that was killed
            outer = run.outer_pid if outcome.reason == "client-died" else 0
            await self._loop.run_in_executor(None, end_stranded, run.plan.run, run.plan.launch.argv, outer)
        try:
            if run.egress:
                await asyncio.wait_for(run.egress.close(), CLOSE_EGRESS_S)
        except TimeoutError:
            run.write_event("warning", {"what": "egress connections did not close in time"})
        finally:
            host_apply.undo(run.plan, self._paths.state)
        found = await self._loop.run_in_executor(None, _look_after, run)
        warnings = (*self._provisions.left(run.plan.run), *found, *warnings)
        self._runs.pop(run.plan.run, None)
        self._one_ended.set()
        run.close(outcome, (*run.limits_reached, *warnings))

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
            end_stranded(plan.run, plan.launch.argv)
            host_apply.undo(plan, self._paths.state)
            self._provisions.recover(plan)
            self._close_record(plan, record)

    def _close_record(self, plan: Plan, record: Record | None) -> None:
        now = time.time()
        known = record or Record(
            id=plan.run, agent=plan.agent, workspace=plan.workspace, command=plan.asked, status="starting",
            started=now, broker_pid=0,
        )  # fmt: skip
        closed = msgspec.structs.replace(known, status="finished", finished=now, exit_code=125, reason="broker-died")
        receipt = Receipt(
            id=plan.run, agent=plan.agent, preset=plan.preset, isolation=plan.isolation, workspace=plan.workspace,
            command=known.command, started=known.started, finished=now, exit_code=125, reason="broker-died",
            policy_digest=plan.policy_digest, plan_digest=plan.digest(), host={}, probe=(), limits=plan.limits,
            opt_outs=plan.opt_outs, notices=plan.notices, connections=0, denials=0, bytes_up=0, bytes_down=0, denied=(),
            warnings=("the broker was killed; counts were lost with it, the events up to then are in the log",),
        )  # fmt: skip
        self._store.finish(closed, receipt)

    async def close(self) -> None:
        """End every run, politely for two seconds; what is asked for a login comes to its end."""
        for run in list(self._runs.values()):
            run.live.stop(1.0)
        await self._wait_empty(3.0)
        for run in list(self._runs.values()):
            run.live.outer_closed()
        await self._wait_empty(3.0)
        await self._provisions.close()

    async def _wait_empty(self, seconds: float) -> None:
        while self._runs:
            self._one_ended.clear()
            try:
                await asyncio.wait_for(self._one_ended.wait(), seconds)
            except TimeoutError:
                return


def _look_after(run: ActiveRun) -> tuple[str, ...]:
    """Return what the person should look at before using tools in the workspace again; overlays are reviewed anyway."""
    if run.record.mode == "overlay" or run.layout is None:
        return ()
    names = [entry.name for entry in protected_names()]
    report = tripwires.look_after(run.layout, names, since_ns=int(run.record.started * 1e9))
    shown = [f"{_shown(finding.path)}: {finding.what} [workspace-changed]" for finding in report.findings]
    return tuple(shown if report.complete else [*shown, "the workspace is too large to be looked at whole"])


def _shown(path: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in path)


def _memory_file(name: str, data: bytes) -> int:
    """Return a descriptor that reads `data` from its start (memfd_create(2))."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _host_words(prepared: Prepared) -> dict[str, object]:
    facts = prepared.host
    return {
        "kernel": facts.kernel,
        "bubblewrap": facts.bwrap.path,
        "landlock_abi": facts.landlock_abi,
        "arch": facts.arch,
    }
