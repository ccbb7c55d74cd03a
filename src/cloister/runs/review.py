"""The changes a run made in overlay mode: found, chosen, applied or thrown away.

`host/overlay_review` reads, `host/overlay_apply` writes; here is which run is meant, whether it
may be touched, and which changes a path on the command line names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from cloister.errors import UsageError
from cloister.host import overlay_apply, overlay_review
from cloister.host.overlay_apply import Outcome, Permission
from cloister.host.overlay_review import Review
from cloister.plan.changes import Change
from cloister.policy.protected import protected_names
from cloister.runs import vm_workspace
from cloister.runs.store import Record, Store

if TYPE_CHECKING:
    from cloister.host.disk_child import Watch


def pending(store: Store, run: str) -> Record:
    """Return the record of a finished run whose changes nobody has applied or discarded yet.

    Raises:
        UsageError: the run is not over, was not in overlay mode, or its changes are gone.
    """
    record = store.record(run)
    folder = f"{store.directory}/{run}"
    there = os.path.isdir(f"{folder}/overlay/upper") or vm_workspace.left(folder)
    if record is None or (record.mode != "overlay" and not there):
        raise UsageError("run-not-overlay", f"run {run} wrote to its workspace directly", remedy="git diff")
    if record.status != "finished":
        raise UsageError("run-not-over", f"run {run} is still going on", remedy=f"cloister stop {run}")
    if not there:
        raise UsageError("overlay-gone", f"the changes of run {run} were applied or discarded already")
    return record


def bring(store: Store, run: str, watch: Callable[[], AbstractContextManager[Watch]]) -> None:
    """Hand back what a virtual machine has left on its disk, watched; nothing where it has left none.

    Raises:
        UsageError: see `pending`.
        CloisterError: the disk cannot be read, or the watch has ended it; see `vm_hand_back`.
    """
    record = pending(store, run)
    if vm_workspace.left(f"{store.directory}/{run}"):
        with watch() as watching:
            vm_workspace.hand_back(f"{store.directory}/{run}", record.workspace, watch=watching)


@contextmanager
def reviewed(store: Store, run: str) -> Iterator[tuple[Record, Review]]:
    """Open the changes of a finished run; those still on a virtual machine's disk are handed back first.

    Raises:
        UsageError: see `pending`.
        CloisterError: the disk cannot be read; see `vm_hand_back`.
    """
    record = pending(store, run)
    vm_workspace.hand_back(f"{store.directory}/{run}", record.workspace)
    upper = f"{store.directory}/{run}/overlay/upper"
    names = [entry.name for entry in protected_names()]
    with overlay_review.open_review(record.workspace, upper, names=names, since_ns=int(record.started * 1e9)) as review:
        yield record, review


def choose(changes: Sequence[Change], paths: Sequence[str], workspace: str, directory: str) -> list[Change]:
    """Return the changes at or below `paths`, as typed in `directory`; all of them where no path is given.

    Raises:
        UsageError: a path names nothing that changed.
    """
    if not paths:
        return list(changes)
    chosen: dict[str, Change] = {}
    for path in paths:
        relative = _relative(path, workspace, directory)
        found = [change for change in changes if change.path == relative or change.path.startswith(f"{relative}/")]
        if relative == "":
            found = list(changes)
        if not found:
            raise UsageError("path-unchanged", f"{path} did not change in this run", remedy="cloister diff RUN --stat")
        chosen |= {change.path: change for change in found}
    return [change for change in changes if change.path in chosen]


def apply(review: Review, changes: Sequence[Change], *, force: bool, protected: bool) -> list[Outcome]:
    """Write changes into the workspace; each is applied whole or refused with a reason."""
    return overlay_apply.apply(review, changes, Permission(force=force, protected=protected))


def discard(store: Store, run: str) -> None:
    """Throw a run's changes away; its records stay."""
    folder = f"{store.directory}/{run}/overlay"
    vm_workspace.drop(f"{store.directory}/{run}")
    if os.path.isdir(folder):
        overlay_apply.discard(folder)
        os.rmdir(folder)


def _relative(path: str, workspace: str, directory: str) -> str:
    """Return a path relative to the workspace: as typed where that exists in it, else as a name in it."""
    absolute = os.path.normpath(path if path.startswith("/") else os.path.join(directory, path))
    if absolute == workspace:
        return ""
    if absolute.startswith(f"{workspace}/"):
        return absolute[len(workspace) + 1 :]
    return os.path.normpath(path).lstrip("/")
