"""What the plans of all backends share: facts of a start, generated files, the command, the environment, warnings.

Pure, like `compile` and `compile_unit`, which put these parts into their own order. Nothing here knows how a
sandbox is built.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from cloister.errors import UnsupportedError
from cloister.isolation import environment, managed
from cloister.isolation.inner import BOX
from cloister.isolation.note import sandbox_note
from cloister.plan.settings import form_of
from cloister.plan.steps import (
    AnyStep,
    CarryPoint,
    Launch,
    Listen,
    ListenAgent,
    MergeSettings,
    PlaceholderFile,
    Plan,
    TrustBundle,
    WriteBytes,
    WriteFile,
    plain,
)
from cloister.plan.workspace import WorkspaceLayout
from cloister.policy.model import Agent, Preset
from cloister.policy.secretscan import names_secret
from cloister.runs import identity_files
from cloister.runs.credentials_plan import planned, spoken
from cloister.runs.internet import OPT_OUT
from cloister.runs.model_files import model_files
from cloister.runs.signing_model import Signing

_NOTE = "note.txt"
_SETTINGS = "settings"
"""In the box: the product's settings, merged for this run; with the end of the name that the product knows."""


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


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about this host, this user and this start that every backend needs."""

    run: str
    agent_name: str
    profile: str = ""
    project: str = ""
    """Directory of the project's own policy file."""
    policy_digest: str
    user: str
    """Whose run it is."""
    home: str
    """Inside."""
    run_state: str
    run_runtime: str
    shim: str
    etc_directory: str
    merged_usr: bool
    extra_system: tuple[str, ...] = ()
    directory: str
    """Where the agent starts: the caller's directory, in the workspace."""
    layout: WorkspaceLayout
    program_path: str = ""
    program_binds: tuple[str, ...] = ()
    program_names: tuple[tuple[str, str], ...] = ()
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    hide: tuple[tuple[str, str], ...] = ()
    """Paths to mask, each with `file` or `directory`."""
    git: tuple[tuple[str, str], ...] = ()
    landlock_abi: int = 0
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
    model_sources: tuple[tuple[str, str], ...] = ()
    """The home's own files that tell of models, by their names below the home; none where the home is not ours."""
    home_names: tuple[str, ...] = ()
    """Variables that a file of the home brings; they count least."""
    filed_names: tuple[str, ...] = ()
    """Variables that files of the policy bring; they count most."""
    file_notices: tuple[str, ...] = ()
    """What there is to say of files that were read."""
    notify: Literal["", "calls", "files"] = ""
    """Which calls the sandbox's first process tells of, where the kernel's own events are not to be had."""


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan tells its reader, beside its steps: fields of `Plan`."""

    limits: tuple[str, ...]
    opt_outs: tuple[str, ...]
    notices: tuple[str, ...]


class Files(msgspec.Struct):
    """Generated files: those shown in the box directory, and those laid over a path of the home."""

    boxed: list[tuple[str, str]]
    homed: list[tuple[str, str]]
    merged: list[MergeSettings] = []
    """Lists of model providers, under those of the home; `path` is a name in the box."""


def plan_of(  # noqa: PLR0913  # the six parts of a plan
    agent: Agent, start: Start, command: tuple[str, ...], egress: tuple[str, ...], steps: Iterable[AnyStep], said: Said
) -> Plan:
    """Return the plan of a run: what every backend writes in its head, around the steps that one of them has made."""
    return Plan(
        run=start.run,
        agent=start.agent_name,
        preset=agent.preset,
        isolation=agent.isolation,
        workspace=start.layout.root,
        policy_digest=start.policy_digest,
        profile=start.profile,
        project=start.project,
        steps=tuple(steps),
        asked=plain(command),
        egress=egress,
        credentials=planned(agent),
        models=start.model_words,
        limits=said.limits,
        opt_outs=said.opt_outs,
        notices=said.notices,
    )


def generated_files(agent: Agent, preset: Preset, start: Start, egress: tuple[str, ...]) -> Files:
    """Return the files that are made for this run."""
    files = Files([], [])
    for index, (name, text) in enumerate(preset.files.items()):
        boxed = f"file-{index}"
        files.boxed.append((boxed, text))
        files.homed.append((name, boxed))
    for file in start.signing.files:
        if not file.data:
            files.boxed.append((file.name, file.text))
        if file.home:
            files.homed.append((file.home, file.name))
    for index, (name, text) in enumerate(model_files(preset, start.protocols, start.models)):
        boxed = f"model-file-{index}"
        if source := dict(start.model_sources).get(name):
            files.merged.append(MergeSettings(path=boxed, source=source, settings=json.loads(text), models=True))
        else:
            files.boxed.append((boxed, text))
        files.homed.append((name, boxed))
    files.homed += [(placed.name, f"login-{index}") for index, placed in enumerate(start.placed)]
    if agent.agent_sandbox.managed:
        files.boxed.append((managed.SETTINGS_FILE, managed.managed_settings(agent)))
    if agent.sandbox_note and (preset.note or preset.note_file):
        note = sandbox_note(
            workspace=start.layout.root, egress=egress, mode=agent.egress.mode, overlay=is_overlay(agent),
            credentials=spoken(planned(agent)), keys=start.signing.spoken,
        )  # fmt: skip
        files.boxed.append((_NOTE, note))
        if preset.note_file:
            files.homed.append((preset.note_file, _NOTE))
    return files


def command_argv(command: tuple[str, ...], agent: Agent, preset: Preset, files: Files, start: Start) -> tuple[str, ...]:
    """Put the resolved program first; behind it the note's arguments, where the product's own command runs."""
    if command[1:2] and command[1] in preset.subcommands:
        return (start.program_path or command[0], *command[1:])
    note = next((text for name, text in files.boxed if name == _NOTE), "")
    flags = tuple(word.replace("{note}", note) for word in preset.note) if note and start.own_command else ()
    if agent.agent_sandbox.managed and start.own_command:
        flags = ("--settings", f"{BOX}/{managed.SETTINGS_FILE}", *flags)
    if start.own_command:
        flags = (*_endpoint(preset, start.protocols), *flags)
    return (start.program_path or command[0], *flags, *command[1:])


def _endpoint(preset: Preset, protocols: tuple[str, ...]) -> tuple[str, ...]:
    """Return the arguments that point a product at our endpoint, where it takes no variable for it."""
    return tuple(
        word.replace("{base_url}", environment.model_url(protocol))
        for protocol, words in preset.base_url_arguments.items()
        if protocol in protocols
        for word in words
    )


def compose_environment(
    agent: Agent, preset: Preset, start: Start, login: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the literal variables, and the names of inherited ones; `login` is the account's name inside."""
    situation = environment.Situation(
        run=start.run,
        agent=start.agent_name,
        user=login,
        home=start.home,
        workspace=start.directory,
        git=(*start.git, *start.signing.git),
        protocols=start.protocols,
    )
    literal, inherit = environment.compose(agent, preset, situation)
    literal |= identity_files.variables(agent.identity)
    literal = start.signing.environment | literal
    brought = (*(name for name in start.home_names if name not in literal), *start.filed_names)
    literal = {name: value for name, value in literal.items() if name not in start.filed_names}
    return literal, tuple(dict.fromkeys((*inherit, *brought)))


def box_steps(start: Start, files: Files, launch: Launch, *, shared: bool = False) -> Iterator[AnyStep]:
    """Yield what stands in the box directory: generated files, what is trusted, and the run's sockets.

    `shared`: the agent has another uid than we, so what it shall read is readable by all; nobody else gets there.
    """
    box, mode = f"{start.run_runtime}/box", 0o644 if shared else 0o600
    for name, text in files.boxed:
        yield WriteFile(path=f"{box}/{name}", text=text, mode=mode)
    for step in files.merged:
        yield msgspec.structs.replace(step, path=f"{box}/{step.path}", mode=mode)
    for index, placed in enumerate(start.placed):
        yield PlaceholderFile(path=f"{box}/login-{index}", text=placed.text, credential=placed.credential, mode=mode)
    for file in start.signing.files:
        if file.data:
            yield WriteBytes(path=f"{box}/{file.name}", data=file.data, mode=mode)
    if environment.TRUST_VARIABLES[0] in launch.environment:
        yield TrustBundle(path=f"{box}/{os.path.basename(environment.TRUST)}", roots=start.trust_roots, mode=mode)
    yield Listen(path=f"{box}/egress.sock", mode=0o666 if shared else 0o600)
    for agent in start.signing.agents:
        yield ListenAgent(
            path=f"{box}/{agent.socket}", kind=agent.kind, words=agent.words, mode=0o666 if shared else 0o600
        )


def carry_points(preset: Preset, over: Sequence[tuple[str, str]]) -> tuple[CarryPoint, ...]:
    """Return the places in the agent's own state onto which files and directories are mounted."""
    return tuple(
        CarryPoint(name, "directory" if kind == "directory" else "file")
        for name, kind in over
        if any(name.startswith(f"{state}/") for state in preset.state)
    )


def boxed_settings(preset: Preset) -> str:
    """Return the name of the product's settings in the box."""
    return f"{_SETTINGS}.{form_of(preset.settings)}"


def refuse_homeless_settings(agent: Agent, preset: Preset) -> None:
    """Refuse settings for a product whose file of settings nobody knows.

    Raises:
        UnsupportedError: `settings-without-file`.
    """
    if agent.settings and not preset.settings:
        raise UnsupportedError(
            "settings-without-file",
            "the preset names no file of settings, so those of the policy would reach nobody",
            where=".settings",
            remedy='remove `settings`, or name the file in a preset of your own: settings = ".tool/settings.json"',
        )


def is_overlay(agent: Agent) -> bool:
    """Say whether changes are kept aside."""
    return agent.workspace.mode == "overlay"


def is_nested(agent: Agent) -> bool:
    """Say whether the agent may build sandboxes of its own."""
    return agent.hardening.nested or agent.agent_sandbox.managed


def seccomp_profile(agent: Agent, *, listeners: bool = False) -> str:
    """Name the filter's variant: the words `nested`, `ptrace`, `netlink`, `listeners`, joined by commas."""
    words = {"nested": is_nested(agent), "ptrace": agent.hardening.ptrace, "netlink": agent.hardening.netlink,
             "listeners": listeners}  # fmt: skip
    return ",".join(word for word, wanted in words.items() if wanted)


def opt_outs(agent: Agent, start: Start, *, direct: bool, is_root: bool = False) -> tuple[str, ...]:
    """Return every named weakening, in the words of the policy; `direct` is a network without the proxy."""
    words = ["started by root: file permissions of the host do not hold it back"] if is_root else []
    if is_nested(agent):
        words.append("hardening.nested: user namespaces and mounts are allowed inside")
    if agent.hardening.ptrace:
        words.append("hardening.ptrace: tracing is allowed inside")
    if agent.hardening.landlock == "off":
        words.append("hardening.landlock = off")
    if direct:
        words.append(OPT_OUT)
    if agent.egress.mode == "learn":
        words.append("egress.mode = learn: every public host is reached, and recorded")
    words += [f"egress.private: {place}" for place in agent.egress.private]
    words += [f"workspace.unprotected: {name}" for name in start.layout.unprotected]
    words += [f"environment carries the secret {name}" for name in agent.pass_environment if names_secret(name)]
    carried = {f"env:{name}" for name in agent.pass_environment}
    words += [
        f"credentials.{name}: the secret itself is carried in by pass_environment"
        for name, one in agent.credentials.items()
        if one.secret in carried
    ]
    words += [f"filesystem.write: {path}" for path in start.write]
    if agent.llm.record:
        words.append("llm.record: prompts and answers are kept, encrypted, beside the run's records")
    words += start.signing.opt_outs
    return tuple(words)


def notices(agent: Agent, start: Start, *, direct: bool, network: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return what the person should know; `network` is what there is to say of a network of its own."""
    told = [*start.layout.notes, *start.file_notices]
    if start.landlock_abi == 0 and agent.hardening.landlock == "available":
        told.append("this kernel has no Landlock: one layer less")
    if direct:
        told += network
        if environment.terminates(agent):
            told.append("credentials are put in by the proxy: what goes round it takes the placeholder to the host")
    if agent.egress.upstream_proxy:
        told.append("an upstream proxy resolves names, so the addresses behind them cannot be checked here")
    return tuple(told)
