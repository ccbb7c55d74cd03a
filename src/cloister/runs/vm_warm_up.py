"""Making templates by hand, before anybody waits for one: for each agent that a name or an image means."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import msgspec

from cloister.errors import UsageError
from cloister.host import vm_snapshot, vm_template
from cloister.host.owner import Owner
from cloister.plan.vm_template import Template
from cloister.policy.model import Images
from cloister.runs import vm_warm
from cloister.runs.compile_vm import image_of
from cloister.runs.paths import Paths
from cloister.runs.prepare import Kitchen
from cloister.runs.prepare_vm import machine_facts, template_wanted
from cloister.runs.request import RunRequest
from cloister.runs.vm_image import IMAGE, open_descriptors
from cloister.runs.vm_narrow import narrowed


class Warmed(NamedTuple):
    """What was made for one agent, or was there."""

    agent: str
    template: Template
    new: bool


def warm_up(  # noqa: PLR0913  # called by name, in one place
    paths: Paths, owner: Owner, name: str, *, memory: str = "", cpus: str = "", say: Callable[[str], None]
) -> list[Warmed]:
    """Make the templates of all agents that `name` means: an agent, or every agent with that image.

    Args:
        paths: the user's places.
        owner: the user.
        name: an agent of the policy, or an image.
        memory: less than the policy's, as `cloister vm start --mem` takes it.
        cpus: fewer than the policy's.
        say: is told what is being made.

    Raises:
        CloisterError: nothing is meant by the name, or one cannot be made.
    """
    kitchen = Kitchen(paths, owner, writes=False)
    done = []
    for agent in _meant(kitchen, name):
        resolved = kitchen.policies.resolve(agent)
        asked = RunRequest(agent=agent, machine="1", memory=memory, cpus=cpus)
        wishes = narrowed(resolved.agent, asked)
        machine = machine_facts(kitchen, wishes, resolved, paths.home, say)
        wanted = template_wanted(wishes, machine)
        if wanted is None:
            raise UsageError(
                "template-unfit",
                f"guests of {agent} always boot",
                where=f".agents.{agent}.microvm",
                remedy="warm = true",
            )
        root = paths.templates
        there = vm_warm.find(root, wanted) is not None
        if not there:
            say(f"booting {wanted.image} {wanted.version} with {wanted.memory_mib} MiB for {agent}")

        opened = partial(_opened, paths, resolved.policy.images, wanted, owner.uid)
        template = vm_warm.make(root, wanted, vm_warm.place_of(kitchen.host()), opened)
        done.append(Warmed(agent, template, not there))
    return done


def _opened(paths: Paths, images: Images, wanted: vm_warm.Wanted, uid: int) -> dict[str, int]:
    found = open_descriptors(paths, images, wanted.image, wanted.manifest, uid)
    return dict(zip(IMAGE, found, strict=True))


def _meant(kitchen: Kitchen, name: str) -> list[str]:
    agents = list(kitchen.policies.document().tables.get("agents", {}))
    if name in agents:
        return [name]
    found = []
    for agent in agents:
        resolved = kitchen.policies.resolve(agent)
        if resolved.agent.isolation == "microvm" and image_of(resolved.agent, resolved.preset) == name:
            found.append(agent)
    if not found:
        raise UsageError(
            "agent-unknown",
            f"{name!r} is no agent, and no agent of the policy runs in an image of that name",
            remedy="cloister agents",
        )
    return found


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A template or a snapshot as it is listed."""

    name: str
    kind: str
    """`template` or `snapshot`."""
    image: str
    agent: str
    workspace: str
    memory_mib: int
    made: float
    stored_bytes: int


def kept(paths: Paths) -> list[Kept]:
    """Return all templates and snapshots, and remove what dead makers left."""
    vm_template.tidy(paths.templates)
    vm_snapshot.tidy(paths.snapshots)
    rows = []
    for directory, template in vm_template.every(paths.templates):
        if template:
            shape = template.shape
            rows.append(
                Kept(
                    name=os.path.basename(directory),
                    kind="template",
                    image=f"{shape.image} {shape.version}",
                    agent="",
                    workspace="",
                    memory_mib=shape.memory_mib,
                    made=template.made,
                    stored_bytes=vm_template.stored(directory),
                )
            )
    for one in vm_snapshot.every(paths.snapshots):
        directory = f"{paths.snapshots}/{one.name}"
        rows.append(
            Kept(
                name=one.name,
                kind="snapshot",
                image=f"{one.image} {one.version}",
                agent=one.agent,
                workspace=one.workspace,
                memory_mib=0,
                made=one.made,
                stored_bytes=vm_template.stored(directory),
            )
        )
    return rows


def forget(paths: Paths, name: str) -> str:
    """Remove a snapshot, or the template whose name begins so; return which.

    Raises:
        UsageError: there is none, or several are meant.
    """
    if any(one.name == name for one in vm_snapshot.every(paths.snapshots)):
        vm_snapshot.remove(paths.snapshots, name)
        return name
    found = [path for path, _ in vm_template.every(paths.templates) if name and os.path.basename(path).startswith(name)]
    if len(found) != 1:
        what = "no template or snapshot" if not found else f"{len(found)} templates"
        raise UsageError("snapshot-unknown", f"{what} with the name {name!r}", remedy="cloister vm snapshots")
    vm_template.remove(found[0])
    return os.path.basename(found[0])
