"""The guest's writable disks, as one run has them: the agent's `/var`, a copy of the workspace, and its way back."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from typing import TYPE_CHECKING

from cloister.errors import CloisterError, RetryError
from cloister.host import vm_snapshot
from cloister.host.child_start import Spares
from cloister.host.vm_disks import HeldDisk, hold_var_disk
from cloister.host.vm_fill import fill
from cloister.host.vm_hand_back import drop
from cloister.plan.vm import DIRECTORY, VmFile, VmLaunch
from cloister.runs.disk_tools import disk_tools
from cloister.runs.vm_living import planned_record
from cloister.runs.vm_snapshots import refuse_strange
from cloister.runs.vm_workspace import end, let_go

if TYPE_CHECKING:
    from cloister.host.disk_child import Watch
    from cloister.plan.steps import Plan
    from cloister.plan.workspace import WorkspaceLayout
    from cloister.runs.paths import Paths

SPARES = Spares(
    ("cloister.host.disk_work", "cloister.host.vm_workspace", "cloister.host.vm_hand_back", "cloister.runs.vm_settle")
)
"""For all machines of this process: a disk is filled before a run, and read after it."""
_ROOM_LEFT = 256 << 20
"""Bytes that stay free on this host's file system when changes are handed back."""


class GuestDisks:
    """Those of one run."""

    def __init__(self, paths: Paths, plan: Plan, layout: WorkspaceLayout, mode: str) -> None:
        """Make nothing."""
        assert plan.launch.vm is not None  # noqa: S101  # only such runs come here
        self._vm: VmLaunch = plan.launch.vm
        self._paths, self._plan, self._layout, self._direct = paths, plan, layout, mode == "direct"
        self._var: HeldDisk | None = None
        self._nameless = -1
        """The `/var` of a run that came from a snapshot."""
        self._made = False
        self.fields: tuple[str, ...] = ()
        """What the guest is told of its workspace."""
        self.notices: tuple[str, ...] = ()

    def make(self, watch: Watch) -> list[int]:
        """Make the disks, or take up the kept one; return descriptors for `var` and `workspace`, the caller's.

        Raises:
            CloisterError: they cannot be made, there is no room for them, or the watch has ended it.
        """
        if self._vm.snapshot:
            return self._restored()
        tools = disk_tools(self._plan.launch.argv[0])
        spare = f"{self._paths.run_state(self._plan.run)}/{DIRECTORY}/var.img"
        self._var = hold_var_disk(tools, self._file("var").path, self._vm.disk_bytes, spare=spare)
        uid, gid = (int(_field(self._vm, name)) for name in ("uid", "gid"))
        image = self._file("workspace").path
        made = fill(tools, self._layout, image, room_bytes=self._vm.disk_bytes, uid=uid, gid=gid, watch=watch)
        self._made = True
        self.fields = made.fields
        self.notices = (*filter(None, [self._var.notice]), *made.notices)
        workspace = os.open(image, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(
            workspace, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # the monitor's descriptor is this one: held while it lives
        return [os.dup(self._var.fd), workspace]

    def _restored(self) -> list[int]:
        """Make the disks from a snapshot's: both are this run's own, and the agent's `/var` stays as it is."""
        record = planned_record(self._paths.snapshots, self._vm)
        refuse_strange(record, self._plan, self._vm)
        image = self._file("workspace").path
        var = f"{os.path.dirname(image)}/var.img"
        targets = {"var": var, "workspace": image, "workspace.baseline": f"{image}.baseline"}
        vm_snapshot.restore(self._paths.snapshots, record, targets)
        self._made, self.fields = True, record.fields
        self.notices = (f"from the snapshot {record.name}: what it keeps below /var goes with this run",)
        opened = [os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC) for path in (var, image)]
        os.unlink(var)
        self._nameless = os.dup(opened[0])
        return opened

    def sources(self) -> dict[str, str | int]:
        """Return what a snapshot copies, by the name of the copy: paths, or a descriptor, the caller's to close.

        Raises:
            RetryError: the run has ended meanwhile.
        """
        image = self._file("workspace").path
        var: str | int
        try:
            var = self._var.path if self._var else os.dup(self._nameless)
        except OSError:
            raise RetryError("run-ending", "the run is ending", where=self._plan.run) from None
        return {"var": var, "workspace": image, "workspace.baseline": f"{image}.baseline"}

    def hand_back(self, started: float, watch: Watch) -> tuple[str, ...]:
        """Take what was changed in the workspace out of its disk; return words for the receipt."""
        if not self._made:
            return ()
        folder, run = self._paths.run_state(self._plan.run), self._plan.run
        if not let_go(self._file("workspace").path):
            return (*self.notices, f"the monitor still holds the workspace's disk: see later (cloister diff {run})")
        try:
            tools = disk_tools(self._plan.launch.argv[0])
            room = shutil.disk_usage(folder).free - _ROOM_LEFT
            done = end(
                folder, self._plan.workspace, started=started, direct=self._direct, tools=tools, room_bytes=room,
                watch=watch,
            )  # fmt: skip
        except (CloisterError, OSError) as error:
            why = error.message if isinstance(error, CloisterError) else error.strerror
            return (*self.notices, f"the changes in the workspace are still on its disk: {why} (cloister diff {run})")
        return (*self.notices, *done.notices)

    def release(self) -> None:
        """Let another machine have the agent's `/var`; a throwaway copy goes."""
        if self._var is not None:
            self._var.close()
            self._var = None
        nameless, self._nameless = self._nameless, -1
        if nameless >= 0:
            os.close(nameless)

    def drop(self) -> None:
        """Nothing ran: there is nothing to hand back."""
        self.release()
        with contextlib.suppress(OSError):
            drop(self._file("workspace").path)

    def _file(self, role: str) -> VmFile:
        return next(file for file in self._vm.files if file.role == role)


def _field(vm: VmLaunch, name: str) -> str:
    return next(word.partition("=")[2] for word in vm.fields if word.startswith(f"{name}="))
