"""Snapshots of a run's machine: the disks as they are at one moment, for other runs of the same agent to begin with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cloister.errors import StepError, UsageError
from cloister.host import qmp
from cloister.plan.vm_snapshot import Disk, Snapshot
from cloister.runs.vm_control import QMP, connect

if TYPE_CHECKING:
    from cloister.plan.steps import Plan
    from cloister.plan.vm import VmLaunch


def record_of(  # noqa: PLR0913  # what a record says
    plan: Plan, vm: VmLaunch, name: str, fields: tuple[str, ...], disks: tuple[Disk, ...], paused_s: float
) -> Snapshot:
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
    )


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


@contextlib.contextmanager
def standing_still(vm: VmLaunch) -> Iterator[None]:
    """Stop the machine's processors for a while; they go on whatever happens.

    Raises:
        StepError: the monitor does not obey, or is one that cannot be asked.
    """
    if vm.monitor != "qemu":
        raise StepError(
            "snapshot-monitor", f"machines of {vm.monitor} are not kept yet", where=".microvm.monitor",
            remedy='monitor = "qemu"',
        )  # fmt: skip
    with contextlib.closing(connect(f"{vm.directory}/{QMP}")) as monitor:
        monitor.call("stop")
        try:
            yield
        finally:
            with contextlib.suppress(qmp.QmpError):
                monitor.call("cont")
