"""Snapshots of a run's machine at one moment, for other runs of the same agent to begin with, or to go on from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cloister.errors import UsageError
from cloister.host import vm_snapshot
from cloister.plan.bridge import NOBODYS_MAC
from cloister.plan.vm_snapshot import Disk, Memory, Snapshot
from cloister.runs.prepare import TOKEN_VARIABLE
from cloister.runs.vm_inside import inside
from cloister.runs.vm_shape import asked_shape_of, living_machine, shape_of
from cloister.runs.vm_warm import host_words, program_words

if TYPE_CHECKING:
    from cloister.credentials.placeholders import Placeholder
    from cloister.plan.steps import Plan
    from cloister.plan.vm import VmLaunch
    from cloister.plan.vm_template import Shape
    from cloister.policy.model import Agent
    from cloister.runs.active import ActiveRun
    from cloister.runs.paths import Paths
    from cloister.runs.request import RunRequest

_RESTORED = "restored="
"""Begins what a guest reports each time that its processes go on."""
_SHAPE = {
    "program": "the monitor", "accelerator": "the accelerator", "host": "the processor or kernel of this host",
    "memory_mib": "the memory's size", "cpus": "the processors", "card": "the network", "machine": "the machine",
}  # fmt: skip
"""Fields of a shape, in words; those of the image are compared before."""


def record_of(  # noqa: PLR0913  # what a record says
    plan: Plan, vm: VmLaunch, name: str, fields: tuple[str, ...], memory: Memory | None, disks: tuple[Disk, ...],
    paused_s: float,
) -> Snapshot:  # fmt: skip
    """Return the record of a snapshot."""
    return Snapshot(
        name=name,
        run=plan.run,
        agent=plan.agent,
        profile=plan.profile,
        workspace=plan.workspace,
        asked=plan.asked,
        image=vm.image,
        version=vm.version,
        manifest=vm.manifest,
        made=time.time(),
        paused_s=paused_s,
        fields=fields,
        disks=disks,
        memory=memory,
    )


def memory_of(
    run: ActiveRun, agent: Agent, placeholders: Mapping[str, str], extra_names: tuple[str, ...], before: Memory | None
) -> Memory:
    """Return what a record says of the memory of a living run.

    Args:
        run: the run.
        agent: what it may do, as it was started.
        placeholders: of its way to models, by variable.
        extra_names: variables that its caller had carried in.
        before: of the memory from which that run itself had gone on.

    Raises:
        OSError: its monitor is not there any more.
    """
    vm = run.plan.launch.vm
    assert vm is not None  # noqa: S101  # only such runs come here
    made = run.credentials.placeholders if run.credentials else None
    named = bool(vm.template) or (before is not None and before.named)
    return Memory(
        shape=living_shape(vm, named=named),
        named=named,
        commands=run.next_session - 1,
        pty=run.plan.launch.pty,
        findings=tuple(found for found in run.live.probe if not found.startswith(_RESTORED)),
        inside=inside(run.plan, agent),
        placeholders={name: _texts(made[name]) for name in made.names()} if made else {},
        model_keys=tuple(filter(None, (placeholders.get(TOKEN_VARIABLE, ""), *(before.model_keys if before else ())))),
        model=vm.model,
        directory=run.plan.launch.directory,
        extra_names=extra_names,
    )


def _texts(made: Placeholder) -> tuple[str, ...]:
    return tuple(filter(None, (made.token, made.key_id, *made.former)))


def living_shape(vm: VmLaunch, *, named: bool) -> Shape:
    """Return what must be equal for a machine to go on from the memory of this one.

    Raises:
        OSError: the monitor is not there.
    """
    if vm.monitor == "firecracker":
        return asked_shape_of(vm, program=program_words(vm.program), host=host_words())
    machine = living_machine(
        vm.program, vm.accelerator, vm.cmdline, memory_mib=vm.memory_mib, cpus=vm.cpus, named=named,
        mac=NOBODYS_MAC if vm.network == "bridge" else "",
    )  # fmt: skip
    return shape_of((vm.image, vm.version, vm.manifest), machine, program=program_words(vm.program), host=host_words())


def kept_record(paths: Paths, request: RunRequest) -> Snapshot | None:
    """Return the record of the snapshot from whose memory a request wants to go on; None where it wants nothing of it.

    Raises:
        UsageError: there is no such snapshot, or it has no memory.
    """
    if not request.resume:
        return None
    record = vm_snapshot.read(paths.snapshots, request.snapshot)
    if record.memory is None:
        raise UsageError(
            "snapshot-disks", f"the snapshot {record.name} has no memory to go on from",
            remedy=f"cloister vm restore --disks {record.name}",
        )  # fmt: skip
    if request.pty and not record.memory.pty:
        raise UsageError(
            "snapshot-terminal", f"the agent of the snapshot {record.name} has no terminal",
            remedy=f"cloister vm restore {record.name}",
        )  # fmt: skip
    return record


def refuse_other(record: Snapshot, plan: Plan, agent: Agent) -> None:
    """Refuse to go on from the memory of another machine, or of one that the policy would not make like that now.

    Raises:
        UsageError: `snapshot-strange`, and what is not the same.
    """
    vm, memory = plan.launch.vm, record.memory
    assert vm is not None and memory is not None  # noqa: S101, PT018  # only such runs come here
    refuse_strange(record, plan, vm)
    was, now = memory.shape, living_shape(vm, named=memory.named)
    for field, what in _SHAPE.items():
        if getattr(was, field) != getattr(now, field):
            raise _strange(record, what)
    made = inside(plan, agent)
    for what in sorted({*memory.inside, *made}):
        if memory.inside.get(what) != made.get(what):
            raise _strange(record, what)


def _strange(record: Snapshot, what: str) -> UsageError:
    return UsageError(
        "snapshot-strange",
        f"the processes of the snapshot {record.name} cannot go on: {what}, then and now, are not the same",
        where=record.name, remedy=f"cloister vm restore --disks {record.name}",
    )  # fmt: skip


def refuse_strange(record: Snapshot, plan: Plan, vm: VmLaunch) -> None:
    """Refuse a snapshot of another agent, another workspace or another image.

    Raises:
        UsageError: says which.
    """
    pairs = (
        ("agent", record.agent, plan.agent),
        ("workspace", record.workspace, plan.workspace),
        ("image", f"{record.image} {record.version}", f"{vm.image} {vm.version}"),
        ("image's manifest", record.manifest, vm.manifest),
    )
    for what, was, now in pairs:
        if was != now:
            raise UsageError(
                "snapshot-strange", f"the snapshot {record.name} has another {what}: {was}, and this is {now}",
                remedy="cloister vm snapshots",
            )  # fmt: skip
