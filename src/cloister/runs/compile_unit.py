"""From a policy and the facts of one start under systemd to a plan: the system's broker calls it.

Pure. The plan has two halves. The steps before the launch are the system's broker's own: the box directory with the
sockets, what is generated and what is trusted. `Launch.unit` is all that is asked of root: properties for the service
manager (`isolation/unit.py`) and mounts by descriptor, in the order in which they are made. A layout of the workspace
comes from the user's own broker; what in it leads outside of the workspace is left out, never mounted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from cloister.errors import UnsupportedError
from cloister.isolation import inner, seccomp, unit
from cloister.isolation.namespace import BIN
from cloister.isolation.unit_network import network_unit
from cloister.plan.settings import form_of, merged
from cloister.plan.steps import AnyStep, IdentityTokens, Launch, MakeDirectory, MakeLink, Plan, WriteBytes
from cloister.plan.unit import COPY_UPPER, UNIT_PREFIX, Account, UnitLaunch, UnitMount
from cloister.policy.model import Agent, Preset
from cloister.policy.units import parse_cpu, parse_duration, parse_size
from cloister.runs import identity_files
from cloister.runs.compile_parts import (
    Files,
    Said,
    Start,
    box_steps,
    boxed_settings,
    carry_points,
    command_argv,
    compose_environment,
    generated_files,
    is_nested,
    is_overlay,
    notices,
    opt_outs,
    plan_of,
    refuse_homeless_settings,
    seccomp_profile,
)
from cloister.runs.internet import WORDS, Internet
from cloister.runs.unenforced import refuse_unenforced_unit
from cloister.runs.unit_internet import UnitInternet

CONTROL_FD = 0
"""The shim's channel is the unit's standard input."""
_FILTER = "seccomp.bpf"
_GRACE_S = 30
"""The broker ends a run after its time with exit code 124; the service manager is there for when it does not."""
_OWN_TMPFS = ("/home", "/run", "/tmp", "/var/tmp")  # noqa: S108  # the unit's own
_IN_PLACE = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib64/")
_REACHED = ("file:", "systemd:", "command:")
"""Secrets that the system's broker can read. The others are a person's, whose session it has nothing to do with."""

Kind = Literal["file", "directory"]


class UnitFacts(Start, frozen=True, kw_only=True):
    """What else a plan for a unit depends on. `home`, `run_state`, `run_runtime`, `directory`: see `Start`.

    `user` is who started the run; `home` is `unit_home(account)`; `run_state` and `run_runtime` are the system's
    broker's; `layout`, `git` and `project_id` are of the user's part; `shim` and `etc_directory` are root's paths.
    """

    account: Account
    caller_uid: int
    """The uid of who started the run: for identity tokens."""
    systemd: int
    """Major version of the host's service manager."""
    machine: str
    """As `uname -m` has it: which system calls there are."""
    project_id: str
    """16 hexadecimal digits."""
    carried: tuple[tuple[str, Kind], ...] = ()
    """Names below the home that came with the request."""
    idmap: bool = True
    """The kernel and the workspace's file system have idmapped mounts, as far as is known before they are made."""
    repository: str = ""
    """The workspace's git directory, where it lies elsewhere and hostd has walked to it."""
    copied: bool = False
    """The user's broker has copied the workspace, since its file system has no idmapped mounts (overlay mode)."""
    probes: tuple[str, ...] = (inner.PROBE_ADDRESS,)
    """Addresses, with ports, that the agent must not reach."""
    direct: UnitInternet | None = None
    """How the run gets a network of its own, in mode `internet`."""


def unit_home(account: Account) -> str:
    """Return the agent's home inside."""
    return f"/home/{account.name}"


def compile_unit(
    agent: Agent, preset: Preset, command: tuple[str, ...], egress: tuple[str, ...], facts: UnitFacts
) -> Plan:
    """Return the plan of one run under systemd.

    Args:
        agent: what it may do, by the system's policy, profiles and the project's own file merged in.
        preset: what is known about the product.
        command: the argv to run, its program as the caller named it.
        egress: the rules in words, for the plan's reader and the note.
        facts: what was looked up, and what came with the request.

    Raises:
        UnsupportedError: the policy asks for what a unit cannot have, or nothing here enforces.
    """
    refuse_unenforced_unit(agent)
    _refuse_out_of_reach(agent, facts)
    direct = facts.direct.internet if facts.direct else None
    egress = (*egress, WORDS) if direct else egress
    files = _files(agent, preset, facts, egress)
    launch = _launch(agent, preset, command_argv(command, agent, preset, files, facts), files, facts)
    said = Said(
        limits=tuple(_limit_words(agent)),
        opt_outs=opt_outs(agent, facts, direct=direct is not None),
        notices=(*_notices(agent, facts, direct), *_unit_notices(facts)),
    )
    return plan_of(
        agent, facts, command, egress, (*_preparations(facts, files, launch, _identity(agent, facts)), launch), said
    )


def _launch(agent: Agent, preset: Preset, command: tuple[str, ...], files: Files, facts: UnitFacts) -> Launch:
    mounts = tuple(_mounts(agent, preset, facts, files))
    literal, inherit = compose_environment(agent, preset, facts, facts.account.name)
    direct = facts.direct.internet if facts.direct else None
    return Launch(
        argv=inner.inner_argv(unit.SHIM, _inner(agent, facts, mounts)),
        command=command,
        directory=facts.directory,
        environment=literal,
        inherit=inherit,
        pty=facts.pty,
        seccomp=seccomp_profile(agent, listeners=bool(facts.notify)),
        ruleset=direct.ruleset if direct else "",
        nft=direct.nft if direct else "",
        pasta=direct.pasta if direct else (),
        runtime_s=parse_duration(agent.limits.runtime_max) if agent.limits.runtime_max else None,
        unit=_unit(agent, preset, facts, files, mounts),
    )


def _notices(agent: Agent, facts: UnitFacts, direct: Internet | None) -> tuple[str, ...]:
    return notices(agent, facts, direct=direct is not None, network=direct.notices if direct else ())


def _identity(agent: Agent, facts: UnitFacts) -> IdentityTokens | None:
    box = f"{facts.run_runtime}/box"
    return identity_files.tokens_step(agent.identity, box, facts.user, facts.caller_uid, mode=0o444)


def _files(agent: Agent, preset: Preset, facts: UnitFacts, egress: tuple[str, ...]) -> Files:
    """Return what is generated; settings and models of the policy alone where the user's broker has merged none."""
    refuse_homeless_settings(agent, preset)
    files = generated_files(agent, preset, facts, egress)
    if agent.settings and preset.settings not in dict(facts.carried):
        text, name = merged(None, agent.settings, form_of(preset.settings))[0].decode(), boxed_settings(preset)
        files.boxed.append((name, text))
        files.homed.append((preset.settings, name))
    sent = dict(facts.carried)
    files.homed = [(name, boxed) for name, boxed in files.homed if not (name in preset.model_files and name in sent)]
    return files


def _preparations(facts: UnitFacts, files: Files, launch: Launch, identity: IdentityTokens | None) -> Iterator[AnyStep]:
    """Yield what the system's broker does: nobody else gets below its runtime directory, so modes are for the agent."""
    box = f"{facts.run_runtime}/box"
    yield MakeDirectory(path=facts.run_runtime)
    yield MakeDirectory(path=box, mode=0o755)
    if identity:
        yield MakeDirectory(path=identity.directory, mode=0o755)
        yield identity
    if facts.program_names:
        yield MakeDirectory(path=f"{box}/bin", mode=0o755)
        for name, path in facts.program_names:
            yield MakeLink(path=f"{box}/bin/{name}", target=path)
    words = launch.seccomp.split(",")
    filtered = seccomp.assemble(
        facts.machine,
        nested="nested" in words,
        ptrace="ptrace" in words,
        netlink="netlink" in words,
        listeners="listeners" in words,
    )
    yield WriteBytes(path=f"{box}/{_FILTER}", data=filtered, mode=0o644)
    yield from box_steps(facts, files, launch, shared=True)


def _unit(agent: Agent, preset: Preset, facts: UnitFacts, files: Files, mounts: tuple[UnitMount, ...]) -> UnitLaunch:
    over = [*facts.carried, *((name, "file") for name, _ in files.homed)]
    group = agent.unit.project_group
    ownership = agent.unit.ownership
    if _kept_aside(agent, facts):
        ownership = "idmap"  # what is applied later is applied by the user
    elif ownership == "auto":
        ownership = "group" if group and not facts.idmap else "idmap"
    limits = agent.limits
    box = unit.UnitBox(
        systemd=facts.systemd,
        account=facts.account.name,
        shim=facts.shim,
        etc_directory=facts.etc_directory,
        merged_usr=facts.merged_usr,
        nested=is_nested(agent),
        netlink=agent.hardening.netlink,
        write_execute=_write_execute(agent, preset),
        tmpfs_bytes=_disk(agent),
        groups=(group,) if ownership == "group" else (),
        internet=facts.direct is not None,
        limits=unit.UnitLimits(
            memory_bytes=parse_size(limits.memory_max) if limits.memory_max else None,
            tasks=limits.tasks_max,
            cpu_percent=parse_cpu(limits.cpu_quota) if limits.cpu_quota else None,
            runtime_s=parse_duration(limits.runtime_max) + _GRACE_S if limits.runtime_max else None,
            open_files=limits.open_files,
            io_weight=agent.unit.io_weight,
            oom=agent.unit.oom,
        ),
    )
    return UnitLaunch(
        unit=f"{UNIT_PREFIX}{facts.run}.service",
        account=facts.account.name,
        uid=facts.account.uid,
        properties=unit.properties(box),
        mounts=mounts,
        state=preset.state,
        seeds=tuple(preset.seed.items()),
        points=tuple((point.name, point.kind) for point in carry_points(preset, over)),
        project=facts.project_id,
        ownership=ownership,
        workspace=facts.layout.root,
        limited=limits.enforce == "cgroup",
        network=network_unit(facts.run, box, facts.direct.outside) if facts.direct else None,
    )


def _inner(agent: Agent, facts: UnitFacts, mounts: tuple[UnitMount, ...]) -> inner.Inner:
    writable = [mount.target for mount in mounts if mount.kind in {"rw", "overlay"} or mount.private]
    return inner.Inner(
        control=CONTROL_FD,
        unit=True,
        seccomp=f"{inner.BOX}/{_FILTER}",
        models=bool(facts.protocols),
        nested=is_nested(agent),
        landlock=agent.hardening.landlock,
        landlock_rw=tuple(dict.fromkeys([*writable, "/dev", "/proc"])),
        notify=facts.notify,
        probe_write=("/usr",),
        probe_connect=facts.direct.internet.probes if facts.direct else (inner.PROBE_ADDRESS,),
    )


def _mounts(agent: Agent, preset: Preset, facts: UnitFacts, files: Files) -> Iterator[UnitMount]:
    """Yield the mounts, parents first: file systems of our own, what is ours, the workspace, what is hidden."""
    size = _disk(agent)
    shown = [path for path in (*facts.program_binds, *facts.extra_system, *facts.read) if not _in_place(path)]
    yield UnitMount(kind="tmpfs", target="/run")  # systemd 252 leaves one that all may write, without a bound
    for top in _tops([facts.layout.root, *shown, *filter(None, [facts.repository])]):
        yield UnitMount(kind="tmpfs", target=top)
    for place in ("/tmp", "/var/tmp", facts.home):  # noqa: S108  # the unit's own
        yield UnitMount(kind="tmpfs", target=place, private=True, size_bytes=size)
    yield UnitMount(kind="ro", target=inner.BOX, base="box")
    if facts.program_names:
        yield UnitMount(kind="ro", target=BIN, base="box", source="bin")
    for path in dict.fromkeys(shown):
        yield UnitMount(kind="ro", target=path, base="host", source=path)
    for name in preset.state:
        yield UnitMount(kind="rw", target=f"{facts.home}/{name}", base="state", source=name)
    for name, _ in facts.carried:
        yield UnitMount(kind="ro", target=f"{facts.home}/{name}", base="carry", source=name)
    for name, boxed in files.homed:
        yield UnitMount(kind="ro", target=f"{facts.home}/{name}", base="box", source=boxed)
    yield from _workspace_mounts(agent, facts, files)
    for path, kind in facts.hide:
        yield UnitMount(kind="mask-directory" if kind == "directory" else "mask-file", target=path)


def _tops(places: list[str]) -> tuple[str, ...]:
    """Return where file systems of our own must be, so that these places can be mount points.

    The skeleton has nothing but the directories that every unit needs; what lies elsewhere gets the first directory
    of its path, and below `/var` the second. `/run` is one already.
    """
    tops = ["/home"]
    for place in places:
        if any(f"{place}/".startswith(f"{own}/") for own in _OWN_TMPFS):
            continue
        parts = place.split("/")
        tops.append("/".join(parts[: 3 if parts[1] == "var" else 2]))
    return tuple(dict.fromkeys(tops))


def _in_place(path: str) -> bool:
    return path.startswith(_IN_PLACE)


def _workspace_mounts(agent: Agent, facts: UnitFacts, files: Files) -> Iterator[UnitMount]:
    """Turn the layout's mounts into those of a unit; contents become files of the box directory.

    Where changes are kept aside, nothing else of what the user's broker says is writable.
    """
    aside, contents = _kept_aside(agent, facts), dict[str, str]()
    for mount in facts.layout.mounts:
        target, place = mount.target, _place_of(mount.target, facts)
        source = _place_of(mount.source or mount.target, facts)
        if place is None or (source is None and mount.op not in {"content", "mask"}):
            continue  # a repository elsewhere: `_unit_notices` says so
        base, name = source or place
        match mount.op:
            case "bind" | "pin" | "overlay" if aside and target == facts.layout.root:
                yield _aside(facts)
            case "bind" | "pin" | "overlay":
                yield UnitMount(kind="ro" if aside else "rw", target=target, base=base, source=name)
            case "ro":
                yield UnitMount(kind="ro", target=target, base=base, source=name)
            case "content":
                boxed = contents.setdefault(mount.content, f"content-{len(contents)}")
                yield UnitMount(kind="ro", target=target, base="box", source=boxed)
            case "mask":
                yield UnitMount(kind="mask-directory" if mount.node.kind == "directory" else "mask-file", target=target)
    files.boxed += [(name, text) for text, name in contents.items()]


def _kept_aside(agent: Agent, facts: UnitFacts) -> bool:
    """Whether changes are kept aside: by the system's policy, or by what the user has narrowed it to."""
    return is_overlay(agent) or any(mount.op == "overlay" for mount in facts.layout.mounts)


def _aside(facts: UnitFacts) -> UnitMount:
    root = facts.layout.root
    if facts.copied:
        return UnitMount(kind="rw", target=root, base="copy", source=COPY_UPPER)
    return UnitMount(kind="overlay", target=root, base="workspace")


def _place_of(path: str, facts: UnitFacts) -> tuple[Literal["workspace", "repository"], str] | None:
    """Return where a path of the layout is mounted from, with its name there; None for what no unit sees."""
    if (name := _below(path, facts.layout.root)) is not None:
        return "workspace", name
    if facts.repository and (name := _below(path, facts.repository)) is not None:
        return "repository", name
    return None


def _below(path: str, root: str) -> str | None:
    """Return a path relative to the workspace, empty for the workspace itself, None for what is outside."""
    if path == root:
        return ""
    return path[len(root) + 1 :] if path.startswith(f"{root}/") else None


def _disk(agent: Agent) -> int | None:
    return parse_size(agent.limits.disk_max) if agent.limits.disk_max else None


def _write_execute(agent: Agent, preset: Preset) -> bool:
    return agent.hardening.write_execute and preset.write_execute


def _refuse_out_of_reach(agent: Agent, facts: UnitFacts) -> None:
    """Refuse what only a person's own broker has: their files, agents of keys, logins and keyrings."""
    for name, one in agent.credentials.items():
        if one.keys:
            raise UnsupportedError(
                "unit-credential", "keys of your own ssh-agent or gpg-agent cannot be used by a system user",
                where=f".credentials.{name}.keys", remedy='a secret of `file:`, or isolation = "namespace"',
            )  # fmt: skip
        if one.secret and not one.secret.startswith(_REACHED):
            scheme = one.secret.partition(":")[0]
            raise UnsupportedError(
                "unit-credential", f"a secret of `{scheme}:` is a person's, and the system's broker cannot read it",
                where=f".credentials.{name}.secret", remedy="`file:`, `systemd:` or `command:` of the system",
            )  # fmt: skip
    for key, paths in (("read", agent.filesystem.read), ("write", agent.filesystem.write)):
        for path in paths:
            if not path.startswith("/") or key == "write":
                why = "written" if key == "write" else "looked up in a home"
                raise UnsupportedError(
                    "unit-path-of-user", f"nothing outside of the workspace can be {why} by a system user: {path}",
                    where=f".filesystem.{key}", remedy="start the agent in a root that holds it, or use `carry`",
                )  # fmt: skip
    _refuse_modes(agent, facts)


def _refuse_modes(agent: Agent, facts: UnitFacts) -> None:
    if agent.unit.ownership == "group" and not agent.unit.project_group:
        raise UnsupportedError(
            "unit-group-missing", 'ownership = "group" needs `project_group`',
            where=".unit.project_group", remedy='project_group = "GROUP"',
        )  # fmt: skip
    if facts.home in {facts.layout.root, facts.directory}:
        raise UnsupportedError("unit-workspace", "the workspace and the agent's home are one", where=facts.home)


def _limit_words(agent: Agent) -> Iterator[str]:
    """Say of each limit what keeps it."""
    limits = agent.limits
    yield "core dumps: off (LimitCORE=)"
    if limits.memory_max:
        yield f"memory_max {limits.memory_max}: unit (MemoryMax=), no swap"
    if limits.tasks_max is not None:
        yield f"tasks_max {limits.tasks_max}: unit (TasksMax=)"
    if limits.cpu_quota:
        yield f"cpu_quota {limits.cpu_quota}: unit (CPUQuota=)"
    if agent.unit.io_weight is not None:
        yield f"io_weight {agent.unit.io_weight}: unit (IOWeight=)"
    if limits.open_files is not None:
        yield f"open_files {limits.open_files}: unit (LimitNOFILE=)"
    if limits.disk_max:
        yield f"disk_max {limits.disk_max}: size of the home's, of /tmp's and of /var/tmp's file system"
    if limits.runtime_max:
        yield f"runtime_max {limits.runtime_max}: broker, exit code 124"


def _unit_notices(facts: UnitFacts) -> Iterator[str]:
    outside = [mount.target for mount in facts.layout.mounts if _place_of(mount.target, facts) is None]
    if outside:
        yield f"git does not work in this workspace: {outside[0]} lies where this agent sees nothing"
    if facts.copied:
        yield "the workspace's file system has no idmapped mounts: the agent works in a copy of it"
