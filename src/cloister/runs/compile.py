"""From a policy and the facts of one start to a plan. The place where the rooms below meet.

Pure: everything that had to be looked up stands in `Facts`, everything that will be done
stands in the `Plan` that comes back. The order is that in which a sandbox is built:
workspace → state → environment → egress → limits → isolation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

import msgspec

from cloister.isolation import inner, namespace
from cloister.isolation.namespace import Box, Mount
from cloister.plan.settings import form_of
from cloister.plan.steps import (
    AnyStep,
    CarryPoints,
    Hold,
    IdentityTokens,
    Launch,
    MakeDirectory,
    MergeSettings,
    Overlay,
    Placeholders,
    Plan,
    SeedFile,
    plain,
)
from cloister.plan.workspace import Mount as LayoutMount
from cloister.policy.model import Agent, Preset
from cloister.runs import identity_files, limits
from cloister.runs.compile_parts import (
    CarriedPath,
    Files,
    PlacedFile,
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
    refuse_homeless_settings,
    seccomp_profile,
)
from cloister.runs.credentials_plan import planned
from cloister.runs.internet import WORDS, Internet
from cloister.runs.unenforced import refuse_unenforced

__all__ = ["CarriedPath", "Facts", "PlacedFile", "compile_run"]

PROJECT_RECORD = "project.json"
"""Beside an agent's state, where no sandbox sees it: whose state it is, so that `gc` can tell when that is gone."""


class Facts(Start, frozen=True, kw_only=True):
    """Everything about this host, this user and this start that the plan depends on."""

    uid: int
    gid: int
    state: str
    """Directory of this agent's own state for this project."""
    bubblewrap: str
    carried: tuple[CarriedPath, ...] = ()
    settings: str = ""
    """Where the product's settings lie in the home; empty without any."""
    limit_means: limits.Means = limits.Means()
    """How the host gives a run a cgroup."""
    holds: bool = False
    """The outer shim can make mounts in a user namespace of its own: tried on this host."""
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
    direct, network = facts.internet is not None, facts.internet.notices if facts.internet else ()
    egress = (*egress, WORDS) if direct else egress
    refuse_homeless_settings(agent, preset)
    files = generated_files(agent, preset, facts, egress)
    if agent.settings:
        files.homed.append((preset.settings, boxed_settings(preset)))
    limited = limits.compile_limits(agent.limits, means=facts.limit_means, run=facts.run, is_root=facts.uid == 0)
    box, holds = _box(agent, facts, preset, limited, files)
    launch = _launch(agent, preset, command_argv(command, agent, preset, files, facts), box, facts, limited)
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
        steps=(*_preparations(agent, preset, facts, files, launch, limited, identity), launch),
        asked=plain(command),
        egress=egress,
        credentials=planned(agent),
        models=facts.model_words,
        limits=limited.words,
        opt_outs=opt_outs(agent, facts, direct=direct, is_root=facts.uid == 0),
        notices=(*limited.notices, *notices(agent, facts, direct=direct, network=network)),
    )


def _preparations(  # noqa: PLR0913  # one place, seven parts of one thing
    agent: Agent,
    preset: Preset,
    facts: Facts,
    files: Files,
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
    yield from box_steps(facts, files, launch)
    if agent.settings:
        path, form = f"{facts.run_runtime}/box/{boxed_settings(preset)}", form_of(preset.settings)
        yield MergeSettings(path=path, source=facts.settings, settings=agent.settings, form=form)
    if facts.layout.placeholders:
        yield Placeholders(workspace=facts.layout.root, points=facts.layout.placeholders)
    for overlay in launch.overlays:
        for path in (f"{facts.run_state}/overlay", overlay.upper, overlay.work):
            yield MakeDirectory(path=path, kept=True)
    if limited.cgroup:
        yield limited.cgroup


def _launch(  # noqa: PLR0913  # one place, six parts of one thing
    agent: Agent, preset: Preset, command: tuple[str, ...], box: Box, facts: Facts, limited: limits.Limited
) -> Launch:
    literal, inherit = compose_environment(agent, preset, facts, facts.user)
    root, copy = facts.layout.root, f"{facts.run_state}/overlay"
    overlays = (Overlay(root, f"{copy}/upper", f"{copy}/work", root),) if is_overlay(agent) else ()
    return Launch(
        argv=namespace.bubblewrap_argv(box),
        command=command,
        directory=facts.directory,
        environment=literal,
        inherit=inherit,
        pty=facts.pty,
        seccomp=seccomp_profile(agent, listeners=bool(facts.notify)),
        overlays=overlays,
        ruleset=facts.internet.ruleset if facts.internet else "",
        nft=facts.internet.nft if facts.internet else "",
        pasta=facts.internet.pasta if facts.internet else (),
        runtime_s=limited.runtime_s,
    )


def _box(
    agent: Agent, facts: Facts, preset: Preset, limited: limits.Limited, files: Files
) -> tuple[Box, tuple[Hold, ...]]:
    """Return what bubblewrap builds, and what is held in the workspace before it does."""
    home = facts.home
    mounts: list[Mount] = [Mount("ro", path, path) for path in facts.program_binds]
    mounts += [Mount("rw", f"{home}/{name}", f"{facts.state}/{name}") for name in preset.state]
    made = preset.settings if agent.settings else ""
    mounts += [Mount("ro", f"{home}/{path.name}", path.source) for path in facts.carried if path.name != made]
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
        nested=is_nested(agent),
        landlock=agent.hardening.landlock,
        landlock_rw=tuple(dict.fromkeys(writable)),
        mdwe=not (agent.hardening.write_execute and preset.write_execute),
        rlimits=limited.rlimits,
        network="shared" if facts.internet else "empty",
        models=bool(facts.protocols),
        notify=facts.notify,
        probe_connect=facts.internet.probes if facts.internet else (inner.PROBE_ADDRESS,),
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


def project_record(facts: Facts) -> str:
    """Return what is written beside an agent's state: whose it is."""
    anchor = facts.layout.git_dirs[0] if facts.layout.git_dirs else ""
    return json.dumps({"path": facts.layout.root, "git": anchor})


def _state_steps(preset: Preset, facts: Facts, files: Files) -> list[AnyStep]:
    """Make the agent's own state, and the places in it onto which files are mounted."""
    steps: list[AnyStep] = [MakeDirectory(path=facts.state, kept=True)]
    steps.append(SeedFile(root=facts.state, name=PROJECT_RECORD, text=project_record(facts)))
    steps += [MakeDirectory(path=f"{facts.state}/{name}", kept=True) for name in preset.state]
    over = [(path.name, path.kind) for path in facts.carried] + [(name, "file") for name, _ in files.homed]
    steps += [SeedFile(root=facts.state, name=name, text=text) for name, text in preset.seed.items()]
    points = carry_points(preset, over)
    if points:
        steps.append(CarryPoints(root=facts.state, points=points))
    return steps
