"""The end of a microVM's workspace: its disk is handed back, then applied (mode `direct`) or kept for review.

The disk is `vm/workspace.img` in the run's records, what is handed back `overlay/upper`, as in overlay mode. A broker
that dies in between leaves one of the two, and `cloister diff` goes on from there. In mode `direct` all is applied or
nothing: only when no change asks for a person, and everything it touches on the host is as the guest was given it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cloister.plan.changes import Change
from cloister.plan.workspace import Value
from cloister.policy.protected import protected_names

if TYPE_CHECKING:
    from cloister.host.e2fs import Tools
    from cloister.host.vm_baseline import Baseline

DISK = "vm/workspace.img"
"""In a run's records: the workspace as the guest has it."""


class Ended(Value, frozen=True):
    """What became of a guest's changes."""

    changes: int = 0
    applied: bool = False
    """They are in the workspace; else they wait for `cloister diff`, unless there are none."""
    notices: tuple[str, ...] = ()
    """What the person should know, one sentence each."""


def left(folder: str) -> bool:
    """Whether the run with the records `folder` has a disk that was not handed back."""
    return os.path.lexists(f"{folder}/{DISK}")


def hand_back(folder: str, tools: Tools | None = None, room_bytes: int | None = None) -> tuple[str, ...]:
    """Hand a run's disk back into `overlay/upper` and remove it; return what the person should know.

    Raises:
        CloisterError: it cannot be read or there is no room; the disk stays for another try.
    """
    with _turn(folder):
        if not left(folder):
            return ()  # somebody else has done it
        return _hand_back(folder, tools, room_bytes)


def drop(folder: str) -> None:
    """Throw a run's disk away, handed back or not, and what a hand-back left that was cut short."""
    if left(folder):
        from cloister.host import vm_hand_back

        with _turn(folder):
            vm_hand_back.drop(f"{folder}/{DISK}")


def end(  # noqa: PLR0913  # a run, its disk, and how it ends
    folder: str,
    workspace: str,
    *,
    started: float,
    direct: bool,
    tools: Tools | None = None,
    room_bytes: int | None = None,
) -> Ended:
    """Hand back the disk of a run that is over, and in mode `direct` write its changes into the workspace.

    Args:
        folder: the run's records.
        workspace: the directory on the host.
        started: when the run began, in seconds since the epoch.
        direct: apply what needs no person.
        tools: e2fsprogs in their jail; found where not given.
        room_bytes: no more content than this (limits.disk_max).

    Raises:
        CloisterError: it cannot be read or there is no room; the disk stays, and `cloister diff` tries again.
    """
    from cloister.host import overlay_apply, overlay_review, sparse, vm_baseline, vm_hand_back

    image, upper = f"{folder}/{DISK}", f"{folder}/overlay/upper"
    with _turn(folder):
        if not left(folder):
            return Ended()
        baseline = vm_baseline.load(image)
        notices = _hand_back(folder, tools, room_bytes, keep=True)
        names = [entry.name for entry in protected_names() if entry.name not in baseline.unprotected]
        applied = False
        with overlay_review.open_review(workspace, upper, names=names, since_ns=int(started * 1e9)) as review:
            changes = review.changes()
            if direct and not (why := _why_not(changes, baseline)):
                outcomes = overlay_apply.apply(review, changes, overlay_apply.Permission())
                refused = [f"{one.path}: {one.why}" for one in outcomes if one.result == "refused"]
                why, applied = "; ".join(refused[:3]), not refused
        if direct and not applied:
            run = folder.rpartition("/")[2]
            notices = (*notices, f"changes are kept for review, since {why}: cloister diff {run}")
        if changes:  # what goes away below must be on the disk elsewhere, also after a power cut
            sparse.sync_file_system(workspace if applied else folder)
        if applied or not changes:
            overlay_apply.discard(f"{folder}/overlay")
            os.rmdir(f"{folder}/overlay")
        vm_hand_back.drop(image)
    return Ended(len(changes), applied and bool(changes), notices)


def _hand_back(folder: str, tools: Tools | None, room_bytes: int | None, *, keep: bool = False) -> tuple[str, ...]:
    from cloister.host import sparse, vm_hand_back

    image, upper = f"{folder}/{DISK}", f"{folder}/overlay/upper"
    notices: tuple[str, ...] = ()
    if not os.path.lexists(upper):  # it appears whole; then only the disk's removal was cut short
        from cloister.runs.disk_tools import disk_tools

        notices = vm_hand_back.hand_back(tools or disk_tools(), image, upper, room_bytes=room_bytes).notices
    if not keep:
        sparse.sync_file_system(folder)
        vm_hand_back.drop(image)
    return notices


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


@contextlib.contextmanager
def _turn(folder: str) -> Iterator[None]:
    """Wait until nobody else ends this run's workspace."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
