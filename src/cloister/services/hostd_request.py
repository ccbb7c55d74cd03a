"""One request to hostd, from its first byte to its end, in a process of its own.

Three interests meet: the caller's, who may be anybody; the system's broker's, who makes the plan; and the host's, which
is ours. Neither of the others is believed: who asks is the kernel's word, where is a descriptor that was walked to,
and what is held against the floor.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

import cloister
from cloister.errors import CloisterError, DeniedError, RetryError, StepError, UnsupportedError, UsageError
from cloister.host import (
    audit_send,
    unit_carry,
    unit_etc,
    unit_limits,
    unit_mounts,
    unit_network,
    unit_records,
    unit_start,
    unit_state,
    unit_watch,
)
from cloister.host.firewall import uid_filtered
from cloister.host.frames import Frame, FrameError, encode_list
from cloister.host.idmap_support import has_idmapped_mounts
from cloister.host.systemd_units import UnitManager
from cloister.host.unit_caller import Caller, identify_caller, peer_uid
from cloister.host.unit_floor import Bounds, check_plan
from cloister.host.unit_grants import (
    FIRST_ORDINARY_GID,
    Place,
    find_grant,
    open_place,
    open_repository,
    read_system,
)
from cloister.host.unit_overlay import open_copy
from cloister.host.unit_wire import Request, Wire, is_run, read_control, read_request
from cloister.plan.bridge import Tap
from cloister.plan.steps import Plan
from cloister.plan.unit import AUDIT_SOCKET, PROXY_USER, PROXYD_SOCKET, Account, Grant, UnitLaunch
from cloister.services import hostd_tap

PLAN_S = 60.0
_LOCK_S = 10.0
MOST_WORDS = 1024
"""Characters of one text in the log."""
MOST_RUNS = 256
MOST_CARRIED = 256 << 20
"""Bytes. Both are of one user at once: what is carried in lies in /run, which is memory, and everybody's."""
SHIMS = (
    os.path.join(os.path.dirname(os.path.abspath(cloister.__file__)), "host", "shim", "cloister-shim"),
    os.path.join(sys.prefix, "bin", "cloister"),
)
"""Where our helper lies on the host: one program, by two names."""
_PLANS = msgspec.json.Decoder(Plan)


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What the system's broker hears of a unit that stands (`S`)."""

    unit: str
    invocation: str
    verified: tuple[str, ...]
    notices: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    """Limits, by the property's name, that the kernel does not keep."""


class _Asked(NamedTuple):
    """A request whose caller, grant and place are known."""

    request: Request
    caller: Caller
    grant: Grant
    account: Account
    place: Place
    repository: tuple[str, int]
    """Path and descriptor of the workspace's git directory, where it lies elsewhere; else nothing, and -1."""


def serve(sock: socket.socket, manager: unit_start.Manager) -> None:
    """Do what one connection asks for."""
    wire = Wire(sock)
    try:
        caller = identify_caller(sock)
        first = wire.receive()
        if hostd_tap.is_tap(first):
            hostd_tap.serve(wire, first, caller, lambda tap: _tap_given(caller, tap))
        elif caller.is_system and not is_run(first):
            _control(wire, first, manager)
        else:
            _run(wire, first, caller)
    except _PassedError as passed:
        wire.refuse(passed.payload)
        _record(peer_uid(sock), "refused", {"by": "the system's broker"})
    except CloisterError as error:
        _record(peer_uid(sock), "refused", {"where": error.where}, error.reference, error.message)
        _note(f"uid {peer_uid(sock)} was refused: {error.message} [{error.reference}] {error.where}")
        wire.finish(error)
    except FrameError:
        return  # the peer left, or is not worth an answer
    except OSError as error:
        wire.finish(_of_host(error))
        raise
    finally:
        wire.close()


def _record(
    uid: int, what: str, details: Mapping[str, audit_send.Value], reason: str = "", message: str = "", **fields: str
) -> str:
    """Tell the keeper of the log what came of a request; return why it is not written, or nothing."""
    allowed = "blocked" if what == "refused" else "allowed"
    shown = {name: str(value)[:MOST_WORDS] for name, value in details.items()} | {"uid": uid}
    event = audit_send.event(
        "hostd.request", "hostd", shown, disposition=allowed, reason=reason, message=(message or what)[:MOST_WORDS],
        **{name: value[:MOST_WORDS] for name, value in fields.items()},
    )  # fmt: skip
    return audit_send.report(event)


def _tap_given(caller: Caller, tap: Tap) -> str:
    """Write down who got a place on the bridge of microVMs; return why it is not written, or nothing."""
    _note(f"{caller.name} got {tap.name} ({tap.address}) on the bridge for {tap.run}")
    details: dict[str, audit_send.Value] = {
        "interface": tap.name,
        "address": tap.address,
        "mac": tap.mac,
        "port": tap.port,
    }
    return _record(caller.uid, "tap", details, run=tap.run, user=caller.name)


def _of_host(error: OSError) -> StepError:
    return StepError("host-refused", f"the host refused: {error.strerror}", where=str(error.filename or ""))


def _control(wire: Wire, first: Frame, manager: unit_start.Manager) -> None:
    """Answer the system's broker, or root."""
    fields = read_control(first)
    match fields.get("verb"):
        case "end" if unit_records.is_run(fields.get("run", "")):
            told: dict[str, object] = {"ended": unit_records.undo(fields["run"])}
        case "recover":
            living = frozenset(filter(None, fields.get("living", "").split(",")))
            told = {"undone": unit_records.recover(manager, living)}
        case _:
            raise UsageError("request-malformed", "hostd knows run, end and recover")
    wire.send("J", msgspec.json.encode(told))


def _run(wire: Wire, first: Frame, caller: Caller) -> None:
    request = read_request(wire, first)
    grant, account = find_grant(read_system(), caller, request.fields["agent"])
    place = open_place(caller, grant, request.workspace, request.directory)
    repository = "", -1
    if request.repository >= 0:
        with contextlib.suppress(DeniedError):  # then git does not work inside, and the plan says so
            repository = open_repository(caller, grant, request.repository)
    _check_account(account)
    _check_share(caller, request)
    asked = _Asked(request, caller, grant, account, place, repository)
    broker = _connect_broker()
    try:
        plan = _ask_broker(broker, wire, asked)
        try:
            with unit_start.connect() as bus:  # systemd takes its time to answer, in which much is looked at
                _start(broker, plan, asked, bus)
        except CloisterError as error:
            broker.finish(error)  # it has a connection to the caller by now, and answers there
        except OSError as error:
            broker.finish(_of_host(error))
            raise
    except FrameError as error:
        raise RetryError("broker-gone", "the system's broker ended meanwhile", remedy="try again") from error
    finally:
        broker.close()


def _check_share(caller: Caller, request: Request) -> None:
    """Refuse what would let one user take the whole host's memory or manager."""
    living = unit_records.living_of(caller.uid)
    if living.runs >= MOST_RUNS:
        raise RetryError(
            "too-many-runs", f"you have {living.runs} runs already", remedy="cloister ps; cloister stop RUN"
        )
    if living.carried + _carried(request) > MOST_CARRIED:
        raise RetryError("too-much-carried", "your runs carry in too much together", remedy="name less in `carry`")


def _carried(request: Request) -> int:
    return os.fstat(request.carry).st_size if request.carry >= 0 else 0


def _check_account(account: Account) -> None:
    """Refuse an account that the password database does not know by this name and number."""
    try:
        entry = pwd.getpwnam(account.name)
    except KeyError:
        entry = None
    if entry is None or entry.pw_uid != account.uid or entry.pw_gid != account.uid:
        raise UnsupportedError("account-missing", "the agent's account is not what was set up", where=account.name,
                               remedy="sudo cloister apply")  # fmt: skip


def _connect_broker() -> Wire:
    """Return a connection to the system's broker, and to nobody else.

    Raises:
        RetryError: it does not answer, or somebody else does.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(5.0)
        sock.connect(PROXYD_SOCKET)
        # By socket activation it is systemd that listens, as root, until the broker is there.
        if peer_uid(sock) not in {0, pwd.getpwnam(PROXY_USER).pw_uid}:
            raise DeniedError(
                "broker-not-the-systems", "somebody else answers as the system's broker", where=PROXYD_SOCKET
            )
    except (OSError, KeyError) as error:
        sock.close()
        raise RetryError("broker-not-there", f"the system's broker does not answer: {error}", where=PROXYD_SOCKET,
                         remedy="systemctl status cloister-proxyd") from error  # fmt: skip
    except CloisterError:
        sock.close()
        raise
    return Wire(sock, PLAN_S)


def _ask_broker(broker: Wire, lease: Wire, asked: _Asked) -> Plan:
    """Hand the request on, with what we know of the caller, and return the plan.

    Raises:
        CloisterError: the broker refuses, in its own words.
    """
    request, caller, account, place = asked.request, asked.caller, asked.account, asked.place
    fields = request.fields | {
        "caller": caller.name,
        "caller_uid": str(caller.uid),
        "caller_gid": str(caller.gid),
        "home": caller.home,
        "account": account.name,
        "account_uid": str(account.uid),
        "root": place.path,
        "granted": place.root,
        "repository": asked.repository[0],
        "idmap": "1" if has_idmapped_mounts(place.workspace) else "",
        "directory": f"{place.path.rstrip('/')}/{place.inside}" if place.inside else place.path,
    }
    packed = encode_list(f"{name}={value}".encode("utf-8", "surrogateescape") for name, value in fields.items())
    broker.send("L", packed, (request.link, lease.fileno(), *request.streams))
    for kind, payload in (("U", request.part), ("V", request.words), ("N", request.environment)):
        broker.send(kind, payload)
    answer = broker.receive()
    if answer.kind == "F" and answer.payload:
        raise _PassedError(answer.payload)
    if answer.kind != "P" or answer.descriptors:
        raise StepError("broker-malformed", "the system's broker said something else than a plan")
    try:
        return _PLANS.decode(answer.payload)
    except (msgspec.DecodeError, ValueError) as error:
        raise StepError("broker-malformed", f"the plan is not understood: {error}") from error


class _PassedError(Exception):
    """The broker's refusal, handed on as it came."""

    def __init__(self, payload: bytes) -> None:
        """Keep the payload of its `F`."""
        super().__init__("refused by the broker")
        self.payload = payload


def _start(broker: Wire, plan: Plan, asked: _Asked, bus: UnitManager) -> None:
    """Start the unit of a plan that is above the floor; undo everything when one step fails."""
    account, place = asked.account, asked.place
    _on_record(plan, asked)
    unit_etc.make_etc(plan, account)
    bounds = Bounds(asked.grant, account, place.path, SHIMS, uid_filtered, repository=asked.repository[0])
    unit = check_plan(plan, bounds)
    _check_groups(unit, asked)
    try:
        # Whoever tidies up when hostd starts may have taken the file of the lock for a left-over one, for a moment.
        lock = unit_records.Lock(plan.run, wait_s=_LOCK_S)
    except BlockingIOError:
        raise StepError("run-exists", "there is such a run already", where=plan.run) from None
    done = False
    try:
        if unit_records.read(plan.run) is not None:
            raise StepError("run-exists", "there is such a run already", where=plan.run)
        record = unit_records.Record(
            run=plan.run, unit=unit.unit, state="starting", caller=asked.caller.name, caller_uid=asked.caller.uid,
            account=account.name, root=place.root, workspace=place.path, carried=_carried(asked.request), plan=plan,
        )  # fmt: skip
        unit_records.write(record)
        try:
            _stand_up(broker, unit, record, asked, bus)
            done = True
        finally:
            if not done:
                unit_records.stop_units(plan.run)
                unit_records.remove(plan.run)
    finally:
        lock.release(remove=True)


def _on_record(plan: Plan, asked: _Asked) -> None:
    """Have it written who is given what, before it is.

    Raises:
        RetryError: it cannot be, and the policy wants no run then.
    """
    details = {"workspace": asked.place.path, "root": asked.place.root}
    why = _record(
        asked.caller.uid, "run", details, run=plan.run, agent=plan.agent, user=asked.caller.name,
        account=asked.account.name, policy=plan.policy_digest, plan=plan.digest(),
    )  # fmt: skip
    if why and read_system().audit == "stop":
        message = f"what agents do cannot be recorded, so none is started: {why}"
        raise RetryError("audit-lost", message, where=AUDIT_SOCKET,
                         remedy="systemctl status cloister-auditd")  # fmt: skip


def _stand_up(broker: Wire, unit: UnitLaunch, record: unit_records.Record, asked: _Asked, bus: UnitManager) -> None:
    """Make directories, unit and mounts, and hand the shim's channel to the broker."""
    with contextlib.ExitStack() as stack:
        sources, owners = _open_sources(unit, record.run, asked, stack), _owners(unit, asked)
        network = unit_network.connect(unit, record.plan.launch) if unit.network else None
        for descriptor in network or ():
            stack.callback(os.close, descriptor)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.enter_context(ours)
        with theirs:
            space = network.space if network else -1
            starting = unit_start.Starting(bus, unit, record.plan.launch.argv, theirs.fileno(), space=space)
        try:
            # While systemd makes the unit, its mounts are made ready.
            mounts = stack.enter_context(unit_mounts.Mounts(unit, sources, owners))
            mounts.get_ready()
        except BaseException:
            starting.abandon()
            raise
        started = starting.finish()
        stack.callback(os.close, started.pidfd)
        if network:
            unit_network.check_inside(started.pid, network.space)
        lacking = _limits_in_force(unit, started.pid)
        unseen = unit_watch.watch(started.pid, _names(record.run, asked))
        count = mounts.put(started.pid)
        unit_records.write(msgspec.structs.replace(record, state="started", invocation=started.invocation))
        shim = Wire(socket.socket(fileno=os.dup(ours.fileno())))
        shim.send("B")  # the mounts are made: it may look at its walls
        shim.close()
        verified = (
            f"{len(unit.properties)} properties",
            f"{count} mounts",
            "ids, powers, filter and namespaces of the first process",
        )
        said = Verified(unit=unit.unit, invocation=started.invocation, verified=verified, lacking=lacking,
                        notices=(*(_network_notices() if network else ()), *unseen))  # fmt: skip
        ours.setblocking(True)
        broker.allow(PLAN_S)
        _note(f"{asked.caller.name} started {asked.account.name} in {asked.place.path} as {unit.unit}")
        broker.send(
            "S", msgspec.json.encode(said), (ours.fileno(), started.pidfd, *((network.channel,) if network else ()))
        )


def _names(run: str, asked: _Asked) -> dict[str, str]:
    """Return what stands in the kernel's events of a run."""
    grant = asked.grant
    return {"run": run, "agent": grant.agent, "user": asked.caller.name, "account": asked.account.name}


def _network_notices() -> tuple[str, ...]:
    """Say what of the network is not as at the last `cloister apply`."""
    unknown = unit_network.unknown_resolvers()
    if not unknown:
        return ()
    told = f"the packet filter does not know {', '.join(unknown)}, whom this host asks for names: names may resolve by"
    return (f"{told} the proxy only, until sudo cloister apply",)


def _limits_in_force(unit: UnitLaunch, pid: int) -> tuple[str, ...]:
    """Return the limits that the kernel does not keep, which systemd does not say.

    Raises:
        UnsupportedError: there is one, and the policy insists on them.
    """
    lacking = unit_limits.not_in_force(unit.properties, unit_limits.cgroups_of(pid, unit.unit))
    if unit.limited and set(lacking) - {"IOWeight"}:  # a share, not a limit
        raise UnsupportedError(
            "limits-not-in-force", "this host has no controller for a limit, and limits.enforce wants all of them kept",
            where=", ".join(f"{name}=" for name in lacking), remedy='limits.enforce = "available", or cloister doctor',
        )  # fmt: skip
    return tuple(lacking)


def _owners(unit: UnitLaunch, asked: _Asked) -> unit_mounts.Owners:
    """Return whose files become the agent's: the caller's own, never those of somebody who shares the directory.

    Raises:
        UnsupportedError: the ids of a workspace that is shared by a group would be mapped: the agent would have the
            rights of its owner, which the caller has not.
    """
    status = os.fstat(asked.place.workspace)
    if unit.ownership == "idmap" and status.st_uid != asked.caller.uid:
        raise UnsupportedError(
            "workspace-ownership", "a workspace that a group shares is used by that group", where=asked.place.path,
            remedy='[agents.X.unit] ownership = "group", with project_group',
        )  # fmt: skip
    group = status.st_gid if status.st_gid in asked.caller.groups else asked.caller.gid
    return unit_mounts.Owners(asked.caller.uid, group, asked.account)


def _note(text: str) -> None:
    """Write a line to the journal: who asked for what, and what came of it. Never words or environment of a run."""
    shown = "".join(char if char.isprintable() else "?" for char in text)
    sys.stderr.write(f"{shown}\n")


def _open_sources(unit: UnitLaunch, run: str, asked: _Asked, stack: contextlib.ExitStack) -> unit_mounts.Sources:
    """Make the run's own directory and the agent's state, and open every base that mounts may come from."""

    def kept(descriptor: int) -> int:
        stack.callback(os.close, descriptor)
        return descriptor

    own = kept(unit_state.make_run_directory(run))
    carry = kept(os.open(unit_state.CARRY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=own))
    if asked.request.carry >= 0:
        unit_carry.unpack(asked.request.carry, carry)
    state = kept(unit_state.open_project(asked.account, unit.project))
    unit_state.fill_project(state, unit, asked.account)
    unit_state.make_tops(unit)
    box = kept(unit_state.open_box(run, pwd.getpwnam(PROXY_USER).pw_uid))
    copy = kept(open_copy(asked.request.copy, asked.caller)) if asked.request.copy >= 0 else -1
    return unit_mounts.Sources(asked.place.workspace, copy, asked.repository[1], state, box, carry, own)


def _check_groups(unit: UnitLaunch, asked: _Asked) -> None:
    """Give the unit no group but that of the workspace, which the caller has as well."""
    for name, value in unit.properties:
        if name != "SupplementaryGroups":
            continue
        number = os.fstat(asked.place.workspace).st_gid
        try:
            wanted = grp.getgrnam(value).gr_gid
        except KeyError:
            wanted = -1
        if (
            unit.ownership != "group"
            or wanted != number
            or number not in asked.caller.groups
            or number < FIRST_ORDINARY_GID
        ):
            raise StepError("below-the-floor", "refused by the host: a group that is not the workspace's", where=value)
