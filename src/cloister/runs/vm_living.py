"""The memory that one run's machine goes on from: verified, sealed, and what loads it. The twin of `vm_template`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cloister.errors import StepError
from cloister.host import qmp, vm_snapshot
from cloister.plan.vm import FIRST_FILE
from cloister.plan.vm_snapshot import MEMORY, STATE
from cloister.runs.vm_shape import LIVING

if TYPE_CHECKING:
    from cloister.plan.vm import VmLaunch
    from cloister.plan.vm_snapshot import Snapshot
    from cloister.runs.paths import Paths


class LivingOf:
    """That of one run. Whoever made it calls `release` in the end."""

    def __init__(self, paths: Paths, vm: VmLaunch) -> None:
        """Open nothing."""
        self._root, self._vm = paths.snapshots, vm
        self._names = (MEMORY, STATE) if vm.monitor == "firecracker" else (MEMORY,)
        self._held: list[int] = []
        self._peer = -1

    def hold(self) -> None:
        """Verify what the plan names, and keep sealed copies. Takes as long as hashing them does.

        Raises:
            CloisterError: it is not what it was.
        """
        record = planned_record(self._root, self._vm)
        for name in self._names:
            self._held.append(vm_snapshot.state(self._root, record, name))

    def descriptors(self) -> list[int]:
        """Return the memory for the monitor, in the order of the plan, the caller's; for QEMU the orders behind it."""
        held, self._held = self._held, []
        if self._vm.monitor == "firecracker":
            return held
        orders, self._peer = qmp.restore_orders(FIRST_FILE + LIVING.index("state"), shared=False)
        return [*held, orders]

    def release(self) -> None:
        """The monitor is over, or never was."""
        for descriptor in (*self._held, self._peer):
            if descriptor >= 0:
                os.close(descriptor)
        self._held, self._peer = [], -1

    def came_up(self) -> None:
        """Nothing follows from that here."""

    def make_later(self) -> None:
        """No template comes of a machine that did not boot."""


def planned_record(root: str, vm: VmLaunch) -> Snapshot:
    """Return the record that a plan names.

    Raises:
        UsageError: there is none of this name.
        StepError: it is another one than when the plan was made.
    """
    record = vm_snapshot.read(root, vm.snapshot)
    if vm.resumes and record.digest() != vm.resumes:
        raise StepError(
            "snapshot-changed", f"the snapshot {record.name} is another one than the plan names",
            where=f"{root}/{record.name}", remedy="the same again",
        )  # fmt: skip
    return record
