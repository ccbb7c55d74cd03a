"""Files off the disk of a machine that does not run: of a run whose disk nobody has handed back, or of a snapshot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, TypeVar

from cloister.errors import CloisterError, StepError, UsageError
from cloister.host import vm_snapshot, vm_take
from cloister.runs import vm_workspace
from cloister.runs.disk_tools import disk_tools
from cloister.runs.paths import Paths
from cloister.runs.store import Store

WORKSPACE = "/workspace"
_VAR, _UPPER = "/var", b"upper"
"""What a guest writes below /var lies in that directory of the agent's disk (host/shim/guest_mounts.c)."""
_Taken = TypeVar("_Taken")


class Stopped(NamedTuple):
    """A machine that does not run, and its disks."""

    name: str
    workspace: str
    """Where its workspace lies on the host, and in the guest as well."""
    disks: dict[str, str]
    """Paths by role: `workspace`, and of a snapshot `var`."""
    folder: str
    """The run's records, or the snapshot: locked while it is read."""
    run: bool = False
    """Of a run: its disk goes when it is handed back."""


def find_stopped(paths: Paths, store: Store, word: str) -> Stopped:
    """Return the run or snapshot that a word means.

    Raises:
        UsageError: there is none, or its disk is not there any more; says where its files are then.
    """
    try:
        run = store.find(word)
    except UsageError as error:
        if not os.path.lexists(f"{paths.snapshots}/{word}") or "/" in word:
            raise UsageError(
                error.reference, f"{error.message}, and no machine of an agent and no snapshot called so",
                remedy=f"cloister vm list; or cloister vm start {word}",
            ) from None  # fmt: skip
        record = vm_snapshot.read(paths.snapshots, word)
        folder = f"{paths.snapshots}/{word}"
        disks = {disk.name: f"{folder}/{disk.name}" for disk in record.disks}
        return Stopped(f"the snapshot {word}", record.workspace, disks, folder)
    plan, folder = store.plan(run), f"{store.directory}/{run}"
    if plan is None or plan.launch.vm is None:
        raise UsageError("vm-not", f"the run {run} has no virtual machine", remedy="cloister vm list")
    if not vm_workspace.left(folder):
        kept = os.path.isdir(f"{folder}/overlay/upper")
        what = "wait for review" if kept else "are in the workspace, or were discarded"
        raise UsageError(
            "vm-disk-gone", f"the disk of run {run} was handed back: its changes {what}", where=plan.workspace,
            remedy=f"cloister diff {run}" if kept else f"ls {plan.workspace}",
        )  # fmt: skip
    return Stopped(f"the run {run}", plan.workspace, {"workspace": f"{folder}/{vm_workspace.DISK}"}, folder, run=True)


def take_from(stopped: Stopped, path: str, take: Callable[[IO[bytes]], _Taken]) -> _Taken:
    """Have `take` read the tar of what is at an absolute path of a machine that does not run; return what it returns.

    Raises:
        UsageError: the path is on no disk that is there, or nothing is at it.
        CloisterError: the disk cannot be read, or `take` has failed.
    """
    role, name = _on_disk(stopped, path)
    try:
        with _held(stopped):
            return vm_take.take_off(disk_tools(), stopped.disks[role], name, take)
    except CloisterError as error:
        if error.reference == "vm-file":
            raise UsageError(error.reference, error.message, where=f"{stopped.name}: {path}") from None
        raise
    except OSError as error:
        raise StepError("vm-take", f"the disk cannot be read: {error.strerror}", where=stopped.name) from error


@contextlib.contextmanager
def _held(stopped: Stopped) -> Iterator[None]:
    """Let nobody hand the disk back meanwhile, or read it in the same place.

    Raises:
        UsageError: somebody just has.
        RetryError: its monitor still writes it.
    """
    with vm_workspace.turn(stopped.folder):
        if stopped.run and not vm_workspace.left(stopped.folder):
            raise UsageError("vm-disk-gone", f"the disk of {stopped.name} was just handed back", remedy="cloister diff")
        if not vm_workspace.let_go(stopped.disks["workspace"]):
            raise vm_workspace.held(stopped.folder)
        yield


def _on_disk(stopped: Stopped, path: str) -> tuple[str, bytes]:
    """Return the disk on which a guest's path lies, and the path on it."""
    plain = os.path.normpath(path)
    for place in (WORKSPACE, stopped.workspace):
        if plain == place or plain.startswith(f"{place}/"):
            return "workspace", os.fsencode(plain[len(place) + 1 :])
    if "var" in stopped.disks and plain.startswith(f"{_VAR}/"):
        return "var", os.fsencode(plain[len(_VAR) + 1 :]).join((_UPPER + b"/", b""))
    kept = "its workspace, and what was written below /var" if "var" in stopped.disks else "its workspace"
    raise UsageError(
        "vm-disk-path", f"of {stopped.name} there is only {kept}", where=path,
        remedy=f"a path below {WORKSPACE}; all else was in memory, or is in the image",
    )  # fmt: skip
