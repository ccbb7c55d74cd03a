"""A run with its sockets: frames to and from both halves of the shim, its egress server, its records.

`LiveRun` decides, this carries out: it turns frames into calls, keeps the run's exec sessions,
writes events and the receipt, and undoes the plan. One object per run, owned by the supervisor.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from cloister.egress.addresses import Guard
from cloister.egress.events import EgressEvent
from cloister.egress.rules import Ruleset
from cloister.host import unit_cgroup
from cloister.host.frames import Frame, decode_list, encode_list
from cloister.host.limits import reached
from cloister.host.mount_check import check_mounts
from cloister.host.sandbox_pid import find_sandbox_pid
from cloister.plan.steps import Plan
from cloister.plan.workspace import WorkspaceLayout
from cloister.policy.model import Agent
from cloister.relay.server import EgressServer
from cloister.runs.attach import Attachment
from cloister.runs.kernel_watch import Watching
from cloister.runs.links import Link
from cloister.runs.live import LiveRun, Outcome, Timer, start_failure
from cloister.runs.notices import Notices
from cloister.runs.starter import Starter
from cloister.runs.store import Direct, Receipt, Record, Store

if TYPE_CHECKING:
    from cloister.credentials.signing import SigningEvent
    from cloister.runs.agent_services import Signers
    from cloister.runs.audit_door import About
    from cloister.runs.credentials import RunCredentials
    from cloister.runs.unit_network import UnitNetwork
    from cloister.runs.vm_run import Guest

FLAG_PTY = 1
FLAG_USERNS = 2
FLAG_NETNS = 4
FLAG_PATIENT = 8
"""The end may take its time: a guest's changes are handed back before it is told."""
_MAX_DENIED = 200
MAX_EVENT_BYTES = 32 << 20
_U32 = 4
_LOOKS, _LOOK_AGAIN_S = 20, 0.05


class Command(NamedTuple):
    """One further command for a running sandbox."""

    words: list[bytes]
    environment: list[bytes]
    directory: str
    pty: bool


class ActiveRun:
    """One run from launch to receipt."""

    _admitted = False
    about: About | None = None
    """Whose run it is, for the audit; None until it is on record."""
    audit: Callable[[ActiveRun, str, dict[str, object]], None] | None = None
    """Gets every event for the audit log."""
    unrecorded = ""
    """Why what happened in between is not in the audit log."""
    guest: Guest | None = None
    """The virtual machine it has, with `isolation = "microvm"`."""
    findings: tuple[str, ...] = ()
    """Of the self-probe of the run whose memory this one goes on from."""
    endless = False
    """A gateway's: where its events reach their bound, the newest are kept and not the oldest."""

    def __init__(  # noqa: PLR0913  # made in one place
        self,
        plan: Plan,
        record: Record,
        store: Store,
        links: tuple[Link, Link],
        call_later: Callable[[float, Callable[[], None]], Timer],
        on_end: Callable[[ActiveRun, Outcome], None],
        host: dict[str, object],
    ) -> None:
        """Take the stored plan and both links (outer, inner)."""
        self.plan, self.record, self.store = plan, record, store
        self.outer, self.inner = links
        self.host = host
        self.egress: EgressServer | None = None
        self.signing: Signers | None = None
        self.layout: WorkspaceLayout | None = None
        self.outer_pid = 0
        self.starter: Starter | None = None
        """Who asked for a detached run, until it runs."""
        self.go = b""
        """The inner half's last word to wait for: command, environment, directory."""
        self.stdio: tuple[int, ...] = ()
        """What the agent gets as its standard streams, where its first process does not have them; ours to close."""
        self.ready = True
        """False while something that the agent needs is not served yet: no go before."""
        self.told: Callable[[dict[str, object]], None] | None = None
        """Gets every event and that the agent runs: the broker of the user, of a run that the system's broker has."""
        self.confine: Callable[[], None] | None = None
        """Puts the sandbox under its limits and says `release` then; none without limits that need it."""
        self.cgroup = ""
        self.limits_reached: tuple[str, ...] = ()
        self.memory_peak = 0
        """Bytes, of a unit that is over; 0 where nobody knows."""
        self.network: Attachment | UnitNetwork | None = None
        self.credentials: RunCredentials | None = None
        self.sessions: dict[int, Link] = {}
        self.warnings: tuple[str, ...] = ()
        self.notices = Notices(self._noticed)
        self.kernel = Watching()  # the kernel's audit of a sandbox; a unit's is hostd's to ask for
        self.next_session = 1
        self._answers: list[Callable[[str], None]] = []
        self.asking = asyncio.Lock()
        """Held while a question stands: the terminal has room for one."""
        self._denied: dict[str, int] = {}
        self._written = self._looks = 0
        self._call_later = call_later
        self._on_end = on_end
        self._events = open(store.events_path(plan.run), "ab", buffering=0)  # noqa: SIM115  # closed by `_ended`
        self.live = LiveRun(plan, self.outer, self.inner, call_later, self._ended, self._is_running)

    def use(self, credentials: RunCredentials | None) -> None:
        """Take what the run may use without holding it."""
        self.credentials = credentials
        if credentials:
            credentials.record_with(self.write_event)

    @property
    def placeholders(self) -> dict[str, str]:
        """Variables of every command of the run that stand for secrets, or are known at its start; never stored."""
        own = self.credentials.environment if self.credentials else {}
        return {**own, **self.guest.environment} if self.guest else own

    def obey(self, agent: Agent, rules: Ruleset, guard: Guard) -> tuple[str, ...]:
        """Put a policy in force that was changed while the run lives, also for what is open.

        Returns the names of credentials that were taken back, or bound to another place or form.
        """
        revoked = self.credentials.update(agent.credentials) if self.credentials else ()
        if revoked:
            self.write_event("credentials-revoked", {"names": revoked})
        if self.egress:
            self.egress.update(rules, guard)
            self.egress.revoke(revoked)
        if self.signing and (why := self.signing.obey(agent)):
            self.write_event("warning", {"what": f"no key may be used any more: {why}"})
        return revoked

    # --- frames ---------------------------------------------------------------------------

    def outer_frame(self, frame: Frame) -> None:
        """Handle a frame of the outer half. It has no descriptors to give; what came is closed."""
        _close_all(frame.descriptors)
        match frame.kind:
            case "S" if len(frame.payload) == 1:
                self.live.signal(frame.payload[0])
            case "C":
                self.live.continued()
            case "N" if len(frame.payload) == _U32 and self.network:
                self.network.namespace_ready(int.from_bytes(frame.payload, "little"))
            case "M":
                self._terminal_ready(0)
            case "W":
                if self.network:
                    self.network.report(frame.payload)
                self.live.sandbox_ended()
            case "A" if self._answers:
                self._answers.pop(0)(frame.payload[:1].decode("ascii", "replace"))

    def inner_frame(self, frame: Frame) -> None:
        """Handle a frame of the inner half: it speaks for hostile surroundings, so sizes are checked."""
        if frame.kind == "M" and len(frame.payload) == _U32 and len(frame.descriptors) == 1:
            self._pass_master(int.from_bytes(frame.payload, "little"), frame.descriptors)
        if frame.kind == "N":
            self.notices.take(frame.payload, frame.descriptors)
        _close_all(frame.descriptors)  # copies travel
        payload = frame.payload
        number = int.from_bytes(payload[:_U32], "little") if len(payload) >= _U32 else 0
        match frame.kind:
            case "P":
                told = tuple(item.decode("utf-8", "replace") for item in decode_list(payload)[0][:64])
                self.live.probed((*self.findings, *told))
                self._admit()
            case "R" if number == 0:
                self.live.running()
            case "Y" if len(payload) >= 2 * _U32:
                self._failed(number, int.from_bytes(payload[4:8], "little"), payload[8:40].decode("ascii", "replace"))
            case "E" if len(payload) == _U32 + 1:
                self._exited(number, payload[4])
            case "Z" if number == 0:
                self.live.stopped()
            case "D" | "H" | "L" | "Q" | "T" if self.guest:
                self.guest.told(self, frame)

    def ask(self, text: str, letters: str, default: str, answer: Callable[[str], None], *, nobody: str) -> None:
        """Put a question to the person at the run's terminal; `answer` gets one letter, `nobody` where none came."""
        self._answers.append(answer)
        self.outer.send("Q", encode_list([word.encode() for word in (text, letters, default, nobody)]))

    def withdraw_question(self) -> None:
        """Take the question off the terminal, if it still stands; it is answered by that."""
        self.outer.send("Q", encode_list([]))

    # --- further commands -------------------------------------------------------------------

    def attach(self, link: Link, command: Command, stdio: tuple[int, ...], on_close: Callable[[Link], None]) -> None:
        """Start another command inside for the client behind `link`; its end is told there.

        With a pty the client is told first that it will get one: it checks that it has a terminal.
        """
        number = self.next_session
        self.next_session += 1
        self.sessions[number] = link

        def on_frame(_: Link, frame: Frame) -> None:
            _close_all(frame.descriptors)
            match frame.kind:
                case "M" if command.pty:
                    self._terminal_ready(number)
                case "S" if len(frame.payload) == 1:
                    self._signal(number, frame.payload[0])
                case "C":
                    self._signal(number, signal.SIGCONT)

        def gone(closed: Link) -> None:
            if self.sessions.pop(number, None):  # the client died: its command ends, the run goes on
                self._signal(number, signal.SIGKILL)
            on_close(closed)

        link.rebind(on_frame, gone)
        if command.pty:
            link.send("B", FLAG_PTY.to_bytes(4, "little") + encode_list([]) * 2)
        self._execute(number, command, () if command.pty else stdio)

    def _pass_master(self, number: int, descriptors: tuple[int, ...]) -> None:
        """Hand the master of a pty to the outer half that asked for it, which checks it."""
        link = self.outer if number == 0 and self.plan.launch.pty else self.sessions.get(number)
        if link:
            link.send("M", b"", descriptors)

    def _terminal_ready(self, number: int) -> None:
        """The outer half relays the pty, at the size of its terminal: the command may start."""
        self.inner.send("M", number.to_bytes(4, "little"))

    def _execute(self, number: int, command: Command, stdio: tuple[int, ...]) -> None:
        head = number.to_bytes(4, "little") + (FLAG_PTY if command.pty else 0).to_bytes(4, "little")
        lists = (
            encode_list(command.words)
            + encode_list(command.environment)
            + encode_list([os.fsencode(command.directory)])
        )
        self.inner.send("X", head + lists, stdio)

    def _signal(self, number: int, signal_number: int) -> None:
        self.inner.send("S", bytes([signal_number]) + number.to_bytes(4, "little"))

    def _failed(self, number: int, error: int, stage: str) -> None:
        if number == 0:
            self.live.failed(error, stage)
        elif link := self.sessions.pop(number, None):
            outcome = start_failure("the command", error, stage)
            link.send("F", bytes([outcome.code]) + outcome.text.encode() + b"\n")
            link.close()

    def _exited(self, number: int, status: int) -> None:
        if number == 0:
            self.count_limits()
            if self.plan.launch.unit:
                self.inner.send("D")  # its first process waits for that: with it goes the cgroup
            self.live.exited(status)
        elif link := self.sessions.pop(number, None):
            link.send("F", bytes([status]))
            link.close()

    def inner_closed(self) -> None:
        """The first process of the sandbox is gone."""
        self.kernel.end()
        self.notices.flush()
        self.count_limits()
        self.live.inner_closed()
        if self.plan.launch.unit:
            self.live.sandbox_ended()  # nobody says `W`: what is left in the unit is systemd's to end

    def count_limits(self) -> None:
        """Keep which limits were reached, while their cgroup is there to say so: systemd removes an empty one."""
        if unit := self.plan.launch.unit:
            self.limits_reached = unit_cgroup.limits_reached(unit.unit) or self.limits_reached
            self.memory_peak = unit_cgroup.memory_peak(unit.unit) or self.memory_peak
        elif self.cgroup:
            self.limits_reached = reached(self.cgroup) or self.limits_reached

    def _mounts_wrong(self, again: Callable[[], None]) -> list[str] | None:
        """Return one sentence for each mount of the workspace that is not, or no longer, as it was laid out.

        None where the sandbox cannot be looked at: one that dies cannot, and others tell of its end. `again` is called
        in a moment then; what cannot be looked at for long is wrong.
        """
        if self.layout is None:
            return []
        pid = find_sandbox_pid(self.outer_pid)
        why = "its first process is not found (it is gone, or the kernel has no CONFIG_PROC_CHILDREN)"
        if pid:
            try:
                found = check_mounts(pid, self.layout)
            except OSError as error:
                why = str(error.strerror)
            else:
                self._looks = 0
                return found
        self._looks += 1
        if self._looks > _LOOKS:
            return [f"the sandbox cannot be looked at: {why}"]
        self._call_later(_LOOK_AGAIN_S, again)
        return None

    def protection_lost(self) -> None:
        """Something protected was touched on the host: end the run where a mount has gone."""
        if self.live.status != "running" or not find_sandbox_pid(self.outer_pid):
            return
        if wrong := self._mounts_wrong(self.protection_lost):
            message = "a protected file was replaced on the host, which takes its protection away"
            self.live.refuse("protection-lost", message, wrong)

    def _admit(self) -> None:
        """Say go, once the self-probe has passed and what is mounted is what was looked at.

        bubblewrap mounts by path, and paths can be swapped between the look and the mount.
        """
        if "verdict=passed" not in self.live.probe or self._admitted or not self.ready:
            return  # the inner half ends by itself
        wrong = self._mounts_wrong(self._admit) if self.live.status == "starting" else None
        if wrong is None:
            return
        self._admitted = True
        if wrong:
            self.live.refuse("workspace-changed", "the workspace changed while the sandbox was set up", wrong)
            return
        self.count_limits()  # a short command can be gone, cgroup and all, before its end is told
        if not self.plan.launch.unit and not self.guest:
            self.kernel.begin(self.outer_pid, self.plan.run, self.plan.agent)
        if self.confine:
            self.confine()
        else:
            self.release()

    def make_ready(self) -> None:
        """Everything that the agent needs is served; its self-probe may have passed already."""
        self.ready = True
        self._admit()

    def release(self) -> None:
        """Let the agent start: everything it is to be held by is in force."""
        self.inner.send("G", self.go, () if self.plan.launch.pty else self.stdio)
        self.go = b""
        self.drop_stdio()

    def drop_stdio(self) -> None:
        """Close our copies of the agent's standard streams: whoever reads its output waits for the last of them."""
        _close_all(self.stdio)
        self.stdio = ()

    # --- records ------------------------------------------------------------------------------

    def note(self, event: EgressEvent) -> None:
        """Record one egress decision."""
        if event.verdict != "allow":
            self._count_denied(f"{event.host}:{event.port} {event.reason}")
        if self.credentials:
            event = self.credentials.note(event)
        self.write_event("egress", msgspec.to_builtins(event))

    def note_signing(self, event: SigningEvent) -> None:
        """Record one signature by a key of the person's own agent, or its refusal."""
        if event.verdict == "deny":
            self._count_denied(f"signing {event.reason}")
        self.write_event("signing", msgspec.to_builtins(event))

    def _count_denied(self, what: str) -> None:
        if what in self._denied or len(self._denied) < _MAX_DENIED:
            self._denied[what] = self._denied.get(what, 0) + 1

    def _noticed(self, kind: str, fields: dict[str, object]) -> None:
        """What processes do goes to the audit alone: the run's own events are for people."""
        if self.audit:
            self.audit(self, kind, fields)

    def write_event(self, kind: str, fields: dict[str, object]) -> None:
        """Append one line to the run's events, and tell the audit."""
        if self.audit:
            self.audit(self, kind, fields)
        if self._written >= MAX_EVENT_BYTES:
            return  # counted in the receipt all the same; an agent must not fill the disk with its denials
        event: dict[str, object] = {"event": kind, "time": time.time(), **fields}
        line = msgspec.json.encode(event) + b"\n"
        self._written += len(line)
        if self.told:
            self.told({"event": event})
        if self._written >= MAX_EVENT_BYTES and self.endless:
            self._turn()
        elif self._written >= MAX_EVENT_BYTES:
            line += msgspec.json.encode({"event": "cut", "time": time.time(), "bytes": self._written}) + b"\n"
        self._events.write(line)

    def _turn(self) -> None:
        """Begin a new file of events; the one before is kept beside it, the one before that is not."""
        path = self.store.events_path(self.plan.run)
        os.replace(path, self.store.earlier_events_path(self.plan.run))
        self._events.close()
        self._events = open(path, "ab", buffering=0)  # noqa: SIM115  # closed by `_ended`
        self._written = 0

    def _tell_starter(self) -> None:
        starter, self.starter = self.starter, None
        if starter:
            starter.tell(self.plan.run)

    def _is_running(self) -> None:
        self._tell_starter()
        if self.told:
            self.told({"running": True})
        self.record = msgspec.structs.replace(self.record, status="running")
        self.store.update(self.record)

    def _ended(self, outcome: Outcome) -> None:
        for link in list(self.sessions.values()):
            link.send(
                "F", bytes([128 + signal.SIGKILL]) + b"cloister: the run ended, and this command with it [run-ended]\n"
            )
            link.close()
        self.sessions.clear()
        self._on_end(self, outcome)

    def note_unrecorded(self, why: str) -> None:
        """Say in record and receipt that the audit log has a gap; nothing means that it is written again."""
        self.unrecorded = self.unrecorded or why
        self.record = msgspec.structs.replace(self.record, unrecorded=why)
        self.store.update(self.record)

    def conclude(self, outcome: Outcome, warnings: tuple[str, ...]) -> Receipt:
        """Write the receipt and return it."""
        self.warnings = (*warnings, *filter(None, (self.kernel.trouble,)))
        receipt = self._receipt(outcome)
        self.store.finish(self.record, receipt)
        if self.starter:
            self.starter.fail(self.plan.run, outcome.code, outcome.reason, outcome.text)
            self.starter = None
        self._events.close()
        return receipt

    def say_goodbye(self, outcome: Outcome, warnings: tuple[str, ...]) -> None:
        """Tell the caller, as the last of all."""
        self.drop_stdio()
        self.live.say_goodbye(outcome, warnings)

    def _used(self) -> tuple[str, ...]:
        """Return which secrets and keys were used, how often and where."""
        return (
            *(self.credentials.summary() if self.credentials else ()),
            *(self.signing.summary() if self.signing else ()),
        )

    def _receipt(self, outcome: Outcome) -> Receipt:
        now = time.time()
        stats = self.egress.stats if self.egress else None
        plan = self.plan
        self.record = msgspec.structs.replace(
            self.record, status="finished", finished=now, exit_code=outcome.code, reason=outcome.reason
        )
        denied = sorted(self._denied.items(), key=lambda item: -item[1])
        return Receipt(
            id=plan.run, agent=plan.agent, preset=plan.preset, isolation=plan.isolation, workspace=plan.workspace,
            command=self.record.command, started=self.record.started, finished=now, exit_code=outcome.code,
            reason=outcome.reason, policy_digest=plan.policy_digest, plan_digest=plan.digest(), host=self.host,
            probe=self.live.probe, limits=plan.limits, opt_outs=plan.opt_outs, notices=plan.notices,
            connections=stats.connections if stats else 0, denials=stats.denials if stats else 0,
            bytes_up=stats.bytes_up if stats else 0, bytes_down=stats.bytes_down if stats else 0,
            denied=tuple(f"{what} ({count} times)" for what, count in denied), warnings=self.warnings,
            credentials=self._used(),
            direct=Direct(*self.network.counted) if self.network and self.network.counted else None,
        )  # fmt: skip


def _close_all(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
