"""The user's part of a run under systemd: what is looked at with the user's own rights, and what stays of it to undo.

The system's broker believes none of it beyond the user's own workspace (`runs/unit_request.py`).
"""

from __future__ import annotations

import os
from typing import NamedTuple

from cloister.errors import PolicyError, Problem
from cloister.host.idmap_support import has_idmapped_mounts
from cloister.isolation.environment import INHERITED
from cloister.plan.steps import Launch, MakeDirectory, Placeholders, Plan
from cloister.plan.unit import COPY_UPPER, COPY_WORK, UNIT_PREFIX, UnitLaunch
from cloister.plan.workspace import WorkspaceLayout
from cloister.runs.carry_tar import Packed, pack
from cloister.runs.file_variables import of_home
from cloister.runs.home_files import merge_settings
from cloister.runs.policies import PolicyFiles, project_text
from cloister.runs.prepare import Kitchen, Looked, own_models
from cloister.runs.request import RunRequest
from cloister.runs.unit_request import UserPart
from cloister.runs.workspaces import project_id

COPY = "overlay"
"""The directory below a run's records in which what it changes is kept, in overlay mode."""


def unit_of(run: str) -> str:
    """Return the name of a run's unit."""
    return f"{UNIT_PREFIX}{run}.service"


def refuse_unfit(looked: Looked, policies: PolicyFiles, profile: str) -> None:
    """Refuse an agent that only the user's own policy puts under systemd.

    Raises:
        PolicyError: `unit-needs-system-policy`.
    """
    name = looked.resolved.name
    if policies.system_isolation(name, profile) != "unit":
        message = (
            f'the system\'s policy has no agent {name!r} with isolation = "unit": only root can give it an account'
        )
        where = looked.resolved.source(("agents", name, "isolation"))
        remedy = 'isolation = "namespace", or ask the owner of this machine: sudo cloister setup'
        raise PolicyError([Problem(message, where, remedy)], reference="unit-needs-system-policy")


def keeps_aside(looked: Looked) -> bool:
    """Whether changes of the workspace are kept aside."""
    return any(mount.op == "overlay" for mount in looked.layout.mounts)


def repository_of(layout: WorkspaceLayout) -> str:
    """Return the git directory of a workspace that has it elsewhere; empty where it has not."""
    outside = [mount.target for mount in layout.mounts if not f"{mount.target}/".startswith(f"{layout.root}/")]
    return min(outside, key=len, default="")


class OfHome(NamedTuple):
    """What of the user's home goes along: a sealed tar, closed by whoever has this, and variables."""

    packed: Packed
    variables: dict[str, str]
    notices: tuple[str, ...]


def of_home_for(looked: Looked, kitchen: Kitchen) -> OfHome:
    """Read what is carried in, with the user's own rights.

    Raises:
        PolicyError: `carry-too-large`.
    """
    agent, preset, home = looked.agent, looked.resolved.preset, kitchen.paths.home
    found = kitchen.home_files(looked)
    variables, notices = of_home(home, found.environment, agent, (looked.layout.root, kitchen.paths.agents))
    made: dict[str, bytes] = {}
    if agent.settings and preset.settings:
        made[preset.settings], told = merge_settings(agent, preset, found.settings)
        notices += told
    for name, (data, told) in own_models(agent, looked.resolved, found).items():
        made[name] = data
        notices += told
    packed = pack(found.carried, found.secrets, made=made)
    return OfHome(packed, variables, (*notices, *packed.notices))


def part_of(
    looked: Looked, request: RunRequest, policies: PolicyFiles, git: tuple[tuple[str, str], ...], home: OfHome
) -> UserPart:
    """Return what the user's broker says of a request.

    Raises:
        PolicyError: the workspace's own policy file cannot be read.
    """
    return UserPart(
        layout=looked.layout,
        project=project_id(looked.layout),
        project_policy=project_text(looked.project),
        own_policy=policies.own_text(looked.resolved.name),
        git=git if looked.agent.git_identity else (),
        extra_names=request.extra_names,
        variables=tuple(home.variables.items()),
        notices=home.notices,
        carried=home.packed.carried,
        copied=keeps_aside(looked) and not _maps_ids(looked.layout.root),
    )


def _maps_ids(directory: str) -> bool:
    opened = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return has_idmapped_mounts(opened)
    finally:
        os.close(opened)


def first_plan(run: str, request: RunRequest, looked: Looked, digest: str, state: str) -> Plan:
    """Return what is undone from if this broker is killed: the user's own steps, before the system's has answered.

    `state` is the directory of the run's records: what is kept aside lies below it.
    """
    agent, layout = looked.agent, looked.layout
    copy = f"{state}/{COPY}"
    places = (copy, f"{copy}/{COPY_UPPER}", f"{copy}/{COPY_WORK}") if keeps_aside(looked) else ()
    aside = tuple(MakeDirectory(path=path, kept=True) for path in places)
    command = request.words if request.replaced else (*agent.command, *request.words)
    unit = UnitLaunch(unit=unit_of(run), account="", uid=0, properties=(), mounts=())
    launch = Launch(argv=(), command=command, directory=request.directory, environment={}, pty=request.pty, unit=unit)
    return Plan(
        run=run, agent=looked.resolved.name, preset=agent.preset, isolation="unit", workspace=layout.root,
        policy_digest=digest, profile=request.profile, project=looked.project,
        steps=(Placeholders(workspace=layout.root, points=layout.placeholders), *aside, launch), asked=command,
    )  # fmt: skip


def with_answer(first: Plan, answer: Plan) -> Plan:
    """Return the plan to keep: what the system's broker decided, and as steps what the user's has to undo."""
    import msgspec

    own = tuple(step for step in first.steps if not isinstance(step, Launch))
    return msgspec.structs.replace(answer, run=first.run, project=first.project, steps=(*own, answer.launch))


def carried_environment(looked: Looked, request: RunRequest) -> dict[str, str]:
    """Return the variables that leave the user's hands: terminal, language, and those that the policy passes."""
    names = (*INHERITED, *looked.agent.pass_environment, *looked.resolved.preset.pass_environment)
    return {name: request.environment[name] for name in names if name in request.environment}
