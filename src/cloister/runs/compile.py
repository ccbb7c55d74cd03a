"""From a policy and the facts of one start to a plan. The place where the rooms below meet.

Pure: everything that had to be looked up stands in `Facts`, everything that will be done
stands in the `Plan` that comes back. The order is that in which a sandbox is built:
workspace → state → environment → egress → limits → isolation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Literal

import msgspec

from cloister.isolation import environment, managed, namespace
from cloister.isolation.namespace import Box, Mount
from cloister.isolation.note import sandbox_note
from cloister.plan.steps import (
    AnyStep,
    CarryPoint,
    CarryPoints,
    Hold,
    IdentityTokens,
    Launch,
    Listen,
    ListenAgent,
    MakeDirectory,
    Overlay,
    PlaceholderFile,
    Placeholders,
    Plan,
    SeedFile,
    TrustBundle,
    WriteBytes,
    WriteFile,
)
from cloister.plan.workspace import Mount as LayoutMount
from cloister.plan.workspace import WorkspaceLayout
from cloister.policy.model import Agent, Preset
from cloister.policy.secretscan import names_secret
from cloister.runs import identity_files, limits
from cloister.runs.credentials_plan import planned, spoken
from cloister.runs.internet import OPT_OUT, WORDS, Internet
from cloister.runs.model_files import model_files
from cloister.runs.signing_model import Signing
from cloister.runs.unenforced import refuse_unenforced

_NOTE = "note.txt"
PROJECT_RECORD = "project.json"
"""Beside an agent's state, where no sandbox sees it: whose state it is, so that `gc` can tell when that is gone."""


class CarriedPath(msgspec.Struct, frozen=True):
    """A path of the home that exists and is carried in."""

    name: str
    source: str
    kind: str


class PlacedFile(msgspec.Struct, frozen=True):
    """A file below the home in which a product finds a login; `{placeholder}` stands in its text."""

    name: str
    text: str
    credential: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about this host, this user and this start that the plan depends on."""

    run: str
    agent_name: str
    profile: str = ""
    project: str = ""
    """Directory of the project's own policy file."""
    policy_digest: str
    uid: int
    gid: int
    user: str
    home: str
    state: str
    """Directory of this agent's own state for this project."""
    run_state: str
    run_runtime: str
    shim: str
    bubblewrap: str
    etc_directory: str
    merged_usr: bool
    extra_system: tuple[str, ...] = ()
    directory: str
    """Where the agent starts: the caller's directory, in the workspace."""
    layout: WorkspaceLayout
    program_path: str = ""
    program_binds: tuple[str, ...] = ()
    program_names: tuple[tuple[str, str], ...] = ()
    carried: tuple[CarriedPath, ...] = ()
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    hide: tuple[tuple[str, str], ...] = ()
    """Paths to mask, each with `file` or `directory`."""
    git: tuple[tuple[str, str], ...] = ()
    limit_means: limits.Means = limits.Means()
    """How the host gives a run a cgroup."""
    landlock_abi: int = 0
    holds: bool = False
    """The outer shim can make mounts in a user namespace of its own: tried on this host."""
    placed: tuple[PlacedFile, ...] = ()
    own_command: bool = True
    """The product's own command runs, not one given on the command line in its place."""
    pty: bool = False
    hostname: str = "cloister"
    trust_roots: str = ""
    """The host's bundle of trusted certificates."""
    signing: Signing = Signing()
    """Keys of the person's own agents, and how programs inside find them."""
    protocols: tuple[str, ...] = ()
    """Protocols of the model traffic that is served inside; none without `llm`."""
    models: tuple[str, ...] = ()
    """Models that the policy names exactly, aliases first."""
    model_words: tuple[str, ...] = ()
    """What the plan says of providers, models and budgets."""
    internet: Internet | None = None
    """How the run gets a network of its own, in mode `internet`."""


def compile_run(agent: Agent, preset: Preset, command: tuple[str, ...], egress: tuple[str, ...], facts: Facts) -> Plan:
    """Return the plan of one run.

    Args:
        agent: what it may do, presets and profiles merged in, tightened.
        preset: what is known about the product.
        command: the argv to run, its program as the caller named it.
        egress: the rules in words, for the plan's reader and the note.
        facts: what was looked up.

    Raises:
        UnsupportedError: the policy asks for something that nothing here enforces.
    """
    refuse_unenforced(agent)
    egress = (*egress, WORDS) if facts.internet else egress
    files = _generated_files(agent, preset, facts, egress)
    limited = limits.compile_limits(agent.limits, means=facts.limit_means, run=facts.run, is_root=facts.uid == 0)
    box, holds = _box(agent, facts, preset, limited, files)
    launch = _launch(agent, preset, _command(command, agent, preset, files, facts), box, facts, limited)
    identity = identity_files.tokens_step(agent.identity, f"{facts.run_runtime}/box", facts.user, facts.uid)
    launch = msgspec.structs.replace(launch, holds=holds)
    return Plan(
        run=facts.run,
        agent=facts.agent_name,
        preset=agent.preset,
        isolation=agent.isolation,
        workspace=facts.layout.root,
        policy_digest=facts.policy_digest,
        profile=facts.profile,
        project=facts.project,
        steps=(*_preparations(preset, facts, files, launch, limited, identity), launch),
        asked=command,
        egress=egress,
        credentials=planned(agent),
        models=facts.model_words,
        limits=limited.words,
        opt_outs=_opt_outs(agent, facts),
        notices=(*limited.notices, *_notices(agent, facts)),
    )


def _preparations(  # noqa: PLR0913  # one place, six parts of one thing
    preset: Preset,
    facts: Facts,
    files: _Files,
    launch: Launch,
    limited: limits.Limited,
    identity: IdentityTokens | None,
) -> Iterator[AnyStep]:
    """Yield everything before the launch, in the order in which it must be there."""
    yield MakeDirectory(path=facts.run_runtime)
    yield MakeDirectory(path=f"{facts.run_runtime}/box")
    yield from _state_steps(preset, facts, files)
    if identity:
        yield MakeDirectory(path=identity.directory)
        yield identity
    yield from _box_steps(facts, files, launch)
    if facts.layout.placeholders:
        yield Placeholders(workspace=facts.layout.root, points=facts.layout.placeholders)
    for overlay in launch.overlays:
        for path in (f"{facts.run_state}/overlay", overlay.upper, overlay.work):
            yield MakeDirectory(path=path, kept=True)
    if limited.cgroup:
        yield limited.cgroup


def _box_steps(facts: Facts, files: _Files, launch: Launch) -> Iterator[AnyStep]:
    """Yield what stands in the box directory: generated files, what is trusted, and the run's sockets."""
    box = f"{facts.run_runtime}/box"
    for name, text in files.boxed:
        yield WriteFile(path=f"{box}/{name}", text=text)
    for index, placed in enumerate(facts.placed):
        yield PlaceholderFile(path=f"{box}/login-{index}", text=placed.text, credential=placed.credential)
    for file in facts.signing.files:
        if file.data:
            yield WriteBytes(path=f"{box}/{file.name}", data=file.data)
    if environment.TRUST_VARIABLES[0] in launch.environment:
        yield TrustBundle(path=f"{box}/{os.path.basename(environment.TRUST)}", roots=facts.trust_roots)
    yield Listen(path=f"{box}/egress.sock")
    for agent in facts.signing.agents:
        yield ListenAgent(path=f"{box}/{agent.socket}", kind=agent.kind, words=agent.words)


def _launch(  # noqa: PLR0913  # one place, six parts of one thing
    agent: Agent, preset: Preset, command: tuple[str, ...], box: Box, facts: Facts, limited: limits.Limited
) -> Launch:
    situation = environment.Situation(
        run=facts.run,
        agent=facts.agent_name,
        user=facts.user,
        home=facts.home,
        workspace=facts.directory,
        git=(*facts.git, *facts.signing.git),
        protocols=facts.protocols,
    )
    literal, inherit = environment.compose(agent, preset, situation)
    literal |= identity_files.variables(agent.identity)
    literal = facts.signing.environment | literal
    root, copy = facts.layout.root, f"{facts.run_state}/overlay"
    overlays = (Overlay(root, f"{copy}/upper", f"{copy}/work", root),) if _is_overlay(agent) else ()
    return Launch(
        argv=namespace.bubblewrap_argv(box),
        command=command,
        directory=facts.directory,
        environment=literal,
        inherit=inherit,
        pty=facts.pty,
        seccomp=_seccomp_profile(agent),
        overlays=overlays,
        ruleset=facts.internet.ruleset if facts.internet else "",
        nft=facts.internet.nft if facts.internet else "",
        pasta=facts.internet.pasta if facts.internet else (),
        runtime_s=limited.runtime_s,
    )


def _is_overlay(agent: Agent) -> bool:
    return agent.workspace.mode == "overlay"


class _Files(msgspec.Struct):
    """Generated files: those shown in the box directory, and those laid over a path of the home."""

    boxed: list[tuple[str, str]]
    homed: list[tuple[str, str]]


def _generated_files(agent: Agent, preset: Preset, facts: Facts, egress: tuple[str, ...]) -> _Files:
    files = _Files([], [])
    for index, (name, text) in enumerate(preset.files.items()):
        boxed = f"file-{index}"
        files.boxed.append((boxed, text))
        files.homed.append((name, boxed))
    for file in facts.signing.files:
        if not file.data:
            files.boxed.append((file.name, file.text))
        if file.home:
            files.homed.append((file.home, file.name))
    for index, (name, text) in enumerate(model_files(preset, facts.protocols, facts.models)):
        boxed = f"model-file-{index}"
        files.boxed.append((boxed, text))
        files.homed.append((name, boxed))
    files.homed += [(placed.name, f"login-{index}") for index, placed in enumerate(facts.placed)]
    if agent.agent_sandbox.managed:
        files.boxed.append((managed.SETTINGS_FILE, managed.managed_settings(agent)))
    if agent.sandbox_note and (preset.note or preset.note_file):
        note = sandbox_note(
            workspace=facts.layout.root, egress=egress, mode=agent.egress.mode, overlay=_is_overlay(agent),
            credentials=spoken(planned(agent)), keys=facts.signing.spoken,
        )  # fmt: skip
        files.boxed.append((_NOTE, note))
        if preset.note_file:
            files.homed.append((preset.note_file, _NOTE))
    return files


def _command(command: tuple[str, ...], agent: Agent, preset: Preset, files: _Files, facts: Facts) -> tuple[str, ...]:
    """Put the resolved program first; behind it the note's arguments, where the product's own command runs."""
    if command[1:2] and command[1] in preset.subcommands:
        return (facts.program_path or command[0], *command[1:])
    note = next((text for name, text in files.boxed if name == _NOTE), "")
    flags = tuple(word.replace("{note}", note) for word in preset.note) if note and facts.own_command else ()
    if agent.agent_sandbox.managed and facts.own_command:
        flags = ("--settings", f"{namespace.BOX}/{managed.SETTINGS_FILE}", *flags)
    if facts.own_command:
        flags = (*_endpoint(preset, facts.protocols), *flags)
    return (facts.program_path or command[0], *flags, *command[1:])


def _endpoint(preset: Preset, protocols: tuple[str, ...]) -> tuple[str, ...]:
    """Return the arguments that point a product at our endpoint, where it takes no variable for it."""
    return tuple(
        word.replace("{base_url}", environment.model_url(protocol))
        for protocol, words in preset.base_url_arguments.items()
        if protocol in protocols
        for word in words
    )


def _box(
    agent: Agent, facts: Facts, preset: Preset, limited: limits.Limited, files: _Files
) -> tuple[Box, tuple[Hold, ...]]:
    """Return what bubblewrap builds, and what is held in the workspace before it does."""
    home = facts.home
    mounts: list[Mount] = [Mount("ro", path, path) for path in facts.program_binds]
    mounts += [Mount("rw", f"{home}/{name}", f"{facts.state}/{name}") for name in preset.state]
    mounts += [Mount("ro", f"{home}/{path.name}", path.source) for path in facts.carried]
    mounts += [Mount("private-directory", f"{home}/{name}") for name in facts.signing.directories]
    mounts += [Mount("ro", f"{home}/{name}", f"{facts.run_runtime}/box/{boxed}") for name, boxed in files.homed]
    mounts += [Mount("ro", path, path) for path in facts.read]
    mounts += [Mount("rw", path, path) for path in facts.write]
    workspace, contents = _workspace_mounts(facts.layout.mounts, facts.run_runtime)
    files.boxed += contents
    holds, workspace = _split_holds(workspace, facts)
    mounts += workspace
    mounts += [Mount("mask-directory" if kind == "directory" else "mask-file", path) for path, kind in facts.hide]
    writable = [home, "/tmp", "/dev", "/proc", *facts.write]  # noqa: S108  # the sandbox's own
    writable += [mount.target for mount in facts.layout.mounts if mount.op in ("bind", "pin", "overlay")]
    box = Box(
        bubblewrap=facts.bubblewrap,
        shim=facts.shim,
        box_directory=f"{facts.run_runtime}/box",
        etc_directory=facts.etc_directory,
        home=home,
        uid=facts.uid,
        gid=facts.gid,
        hostname=facts.hostname,
        system=namespace.system_mounts(facts.merged_usr, facts.extra_system),
        mounts=tuple(mounts),
        programs=facts.program_names,
        tmpfs_bytes=limited.disk_bytes,
        nested=_nested(agent),
        landlock=agent.hardening.landlock,
        landlock_rw=tuple(dict.fromkeys(writable)),
        mdwe=not (agent.hardening.write_execute and preset.write_execute),
        rlimits=limited.rlimits,
        network="shared" if facts.internet else "empty",
        models=bool(facts.protocols),
        probe_connect=facts.internet.probes if facts.internet else (namespace.PROBE_ADDRESS,),
    )
    return box, holds


def _split_holds(mounts: list[Mount], facts: Facts) -> tuple[tuple[Hold, ...], list[Mount]]:
    """Take out what can be held beforehand: binds strictly inside the workspace, which its own bind brings along.

    bubblewrap reads its whole mount table for every bind, so a dozen protections cost more than all else it does.
    Masks stay with it: they come last, and some are tmpfs.
    """
    if not facts.holds:
        return (), mounts
    held = [
        mount for mount in mounts if mount.kind in ("ro", "rw") and mount.target.startswith(facts.layout.root + "/")
    ]
    modes: dict[str, Literal["ro", "rw"]] = {"ro": "ro", "rw": "rw"}
    holds = tuple(
        Hold(modes[mount.kind], mount.target, "" if mount.source == mount.target else mount.source) for mount in held
    )
    return holds, [mount for mount in mounts if mount not in held]


def _workspace_mounts(mounts: tuple[LayoutMount, ...], runtime: str) -> tuple[list[Mount], list[tuple[str, str]]]:
    """Turn the layout's mounts into bubblewrap's; contents become files of the box directory."""
    result: list[Mount] = []
    contents: dict[str, str] = {}
    for mount in mounts:
        match mount.op:
            case "bind" | "pin" | "overlay":  # the outer shim has put the overlay there
                result.append(Mount("rw", mount.target, mount.source or mount.target))
            case "ro":
                result.append(Mount("ro", mount.target, mount.source or mount.target))
            case "content":
                boxed = contents.setdefault(mount.content, f"content-{len(contents)}")
                result.append(Mount("ro", mount.target, f"{runtime}/box/{boxed}"))
            case "mask":
                kind = "mask-directory" if mount.node.kind == "directory" else "mask-file"
                result.append(Mount("mask-directory" if kind == "mask-directory" else "mask-file", mount.target))
    return result, [(name, text) for text, name in contents.items()]


def _state_steps(preset: Preset, facts: Facts, files: _Files) -> list[AnyStep]:
    """Make the agent's own state, and the places in it onto which files are mounted."""
    anchor = facts.layout.git_dirs[0] if facts.layout.git_dirs else ""
    project = json.dumps({"path": facts.layout.root, "git": anchor})
    steps: list[AnyStep] = [MakeDirectory(path=facts.state, kept=True)]
    steps.append(SeedFile(root=facts.state, name=PROJECT_RECORD, text=project))
    steps += [MakeDirectory(path=f"{facts.state}/{name}", kept=True) for name in preset.state]
    over = [(path.name, path.kind) for path in facts.carried] + [(name, "file") for name, _ in files.homed]
    steps += [SeedFile(root=facts.state, name=name, text=text) for name, text in preset.seed.items()]
    points = [
        CarryPoint(name, "directory" if kind == "directory" else "file")
        for name, kind in over
        if any(name.startswith(f"{state}/") for state in preset.state)
    ]
    if points:
        steps.append(CarryPoints(root=facts.state, points=tuple(points)))
    return steps


def _nested(agent: Agent) -> bool:
    return agent.hardening.nested or agent.agent_sandbox.managed


def _seccomp_profile(agent: Agent) -> str:
    """Name the filter's variant: the words `nested`, `ptrace`, `netlink`, joined by commas."""
    words = {"nested": _nested(agent), "ptrace": agent.hardening.ptrace, "netlink": agent.hardening.netlink}
    return ",".join(word for word, wanted in words.items() if wanted)


def _opt_outs(agent: Agent, facts: Facts) -> tuple[str, ...]:
    """Every named weakening, in the words of the policy."""
    words = ["started by root: file permissions of the host do not hold it back"] if facts.uid == 0 else []
    if _nested(agent):
        words.append("hardening.nested: user namespaces and mounts are allowed inside")
    if agent.hardening.ptrace:
        words.append("hardening.ptrace: tracing is allowed inside")
    if agent.hardening.landlock == "off":
        words.append("hardening.landlock = off")
    if facts.internet:
        words.append(OPT_OUT)
    if agent.egress.mode == "learn":
        words.append("egress.mode = learn: every public host is reached, and recorded")
    words += [f"egress.private: {place}" for place in agent.egress.private]
    words += [f"workspace.unprotected: {name}" for name in facts.layout.unprotected]
    words += [f"environment carries the secret {name}" for name in agent.pass_environment if names_secret(name)]
    carried = {f"env:{name}" for name in agent.pass_environment}
    words += [
        f"credentials.{name}: the secret itself is carried in by pass_environment"
        for name, one in agent.credentials.items()
        if one.secret in carried
    ]
    words += [f"filesystem.write: {path}" for path in facts.write]
    if agent.llm.record:
        words.append("llm.record: prompts and answers are kept, encrypted, beside the run's records")
    words += facts.signing.opt_outs
    return tuple(words)


def _notices(agent: Agent, facts: Facts) -> tuple[str, ...]:
    notices = list(facts.layout.notes)
    if facts.landlock_abi == 0 and agent.hardening.landlock == "available":
        notices.append("this kernel has no Landlock: one layer less")
    if facts.internet:
        notices += facts.internet.notices
        if environment.terminates(agent):
            notices.append("credentials are put in by the proxy: what goes round it takes the placeholder to the host")
    if agent.egress.upstream_proxy:
        notices.append("an upstream proxy resolves names, so the addresses behind them cannot be checked here")
    return tuple(notices)
