"""What becomes of changes that were handed back: looked at, applied or kept. A child of a run's end (`vm_workspace`).

Changes and the record of a large workspace take long to look at, so this is no work for the process that serves other
runs' connections. It writes into the workspace with the user's own rights, as `cloister apply` does.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Any

from cloister.host import overlay_apply, overlay_review, sparse, vm_baseline, vm_hand_back
from cloister.host.child_main import Tell
from cloister.host.vm_baseline import Baseline
from cloister.plan.changes import Change
from cloister.policy.protected import protected_names
from cloister.runs.vm_workspace import DISK, Ended


def settle(folder: str, workspace: str, *, started: float, direct: bool) -> Ended:
    """Look at the changes in `overlay/upper`, in mode `direct` apply them, and remove what is not needed any more.

    Args:
        folder: the run's records.
        workspace: the directory on the host.
        started: when the run began, in seconds since the epoch.
        direct: apply all, when none of them needs a person.

    Raises:
        CloisterError: they cannot be looked at; they stay for another try.
    """
    image, upper = f"{folder}/{DISK}", f"{folder}/overlay/upper"
    baseline = vm_baseline.load(image)
    names = [entry.name for entry in protected_names() if entry.name not in baseline.unprotected]
    notices: tuple[str, ...] = ()
    applied = False
    with overlay_review.open_review(workspace, upper, names=names, since_ns=int(started * 1e9)) as review:
        changes = review.changes()
        if direct and not (why := _why_not(changes, baseline)):
            outcomes = overlay_apply.apply(review, changes, overlay_apply.Permission())
            refused = [f"{one.path}: {one.why}" for one in outcomes if one.result == "refused"]
            why, applied = "; ".join(refused[:3]), not refused
    if direct and not applied:
        run = folder.rpartition("/")[2]
        notices = (f"changes are kept for review, since {why}: cloister diff {run}",)
    if changes:  # what goes away below must be on the disk elsewhere, also after a power cut
        sparse.sync_file_system(workspace if applied else folder)
    if applied or not changes:
        overlay_apply.discard(f"{folder}/overlay")
        os.rmdir(f"{folder}/overlay")
    vm_hand_back.drop(image)
    return Ended(len(changes), applied and bool(changes), notices)


def _settle(order: dict[str, Any], tell: Tell) -> object:
    del tell
    return settle(order["folder"], order["workspace"], started=order["started"], direct=order["direct"])


WORKS = {"settle": _settle}
"""For `child_main`."""


def _why_not(changes: Sequence[Change], baseline: Baseline) -> str:
    """Say why changes need a person; nothing where they do not."""
    for change in changes:
        if why := change.never or change.asks:
            return f"{change.path}: {why}"
        if any(_touches(change.path, name) for name in baseline.protected):
            return f"{change.path} is protected"
        if change.conflict or not _as_given(change, baseline):
            return f"{change.path} changed on the host meanwhile"
    return ""


def _as_given(change: Change, baseline: Baseline) -> bool:
    """Whether the host has at a path what the guest was given there."""
    before, was = change.before, baseline.entries.get(os.fsencode(change.path))
    if was is None or not was.given:
        return before.kind == "absent"
    if before.kind == "directory":
        return stat.S_ISDIR(was.mode)
    return (before.size, before.mtime_ns, before.ctime_ns) == (was.size, was.mtime_ns, was.ctime_ns)


def _touches(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}/") or name.startswith(f"{path}/")
