"""The end of a microVM's workspace: its disk is handed back, then applied (mode `direct`) or kept for review.

The disk is `vm/workspace.img` in the run's records, what is handed back `overlay/upper`, as in overlay mode. A broker
that dies in between leaves one of the two, and `cloister diff` goes on from there. In mode `direct` all is applied or
nothing: only when no change asks for a person, and everything it touches on the host is as the guest was given it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cloister.errors import RetryError
from cloister.plan.workspace import Value

if TYPE_CHECKING:
    from cloister.host.disk_child import Watch
    from cloister.host.e2fs import Tools
    from cloister.host.vm_hand_back import HandBack

DISK = "vm/workspace.img"
"""In a run's records: the workspace as the guest has it."""
_PATIENCE_S, _POLL_S = 20.0, 0.02
_SETTLE = "cloister.runs.vm_settle"


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


def hand_back(  # a run, its disk, and who waits
    folder: str, workspace: str, *, tools: Tools | None = None, room_bytes: int | None = None,
    watch: Watch | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """Hand a run's disk back into `overlay/upper` and remove it; return what the person should know.

    Raises:
        RetryError: its monitor still has it.
        CloisterError: it cannot be read or there is no room, or the watch has ended it; the disk stays.
    """
    with turn(folder):
        if not left(folder):
            return ()  # somebody else has done it
        if not let_go(f"{folder}/{DISK}"):
            raise held(folder)
        from cloister.host import sparse, vm_hand_back

        back = _hand_back(folder, workspace, tools, room_bytes, watch)
        sparse.sync_file_system(folder)
        vm_hand_back.drop(f"{folder}/{DISK}")
        return back.notices if back else ()


def drop(folder: str) -> None:
    """Throw a run's disk away, handed back or not, and what a hand-back left that was cut short."""
    if left(folder):
        from cloister.host import vm_hand_back

        with turn(folder):
            vm_hand_back.drop(f"{folder}/{DISK}")


def tidy(folder: str) -> None:
    """Remove what work on a run's disk has left whose process was killed; what is whole stays."""
    if os.path.isdir(os.path.dirname(f"{folder}/{DISK}")):
        from cloister.host import vm_hand_back

        vm_hand_back.tidy(f"{folder}/{DISK}")


def end(  # noqa: PLR0913  # a run, its disk, and how it ends
    folder: str,
    workspace: str,
    *,
    started: float,
    direct: bool,
    tools: Tools | None = None,
    room_bytes: int | None = None,
    watch: Watch | None = None,
) -> Ended:
    """Hand back the disk of a run that is over, and in mode `direct` write its changes into the workspace.

    Two children do it: one that reads the disk and has nothing else, one that looks at what came of it (`vm_settle`).

    Args:
        folder: the run's records.
        workspace: the directory on the host.
        started: when the run began, in seconds since the epoch.
        direct: apply what needs no person.
        tools: e2fsprogs in their jail, and the reader's filter; found where not given.
        room_bytes: no more content than this (limits.disk_max).
        watch: who waits for it.

    Raises:
        CloisterError: it cannot be read or there is no room; the disk stays, and `cloister diff` tries again.
    """
    from cloister.host import overlay_apply, vm_hand_back
    from cloister.host.disk_child import Watch, in_child

    with turn(folder):
        if not left(folder):
            return Ended()
        back = _hand_back(folder, workspace, tools, room_bytes, watch)
        notices = back.notices if back else ()
        if back and not back.changes:
            overlay_apply.discard(f"{folder}/overlay")
            os.rmdir(f"{folder}/overlay")
            vm_hand_back.drop(f"{folder}/{DISK}")
            return Ended(notices=notices)
        order = {"folder": folder, "workspace": workspace, "started": started, "direct": direct}
        whole = Watch(spares=watch.spares if watch else None)  # what is applied is applied whole
        ended = in_child("settle", order, Ended, descriptors={}, program=_SETTLE, watch=whole)
    return Ended(ended.changes, ended.applied, (*notices, *ended.notices))


def _hand_back(
    folder: str, workspace: str, tools: Tools | None, room_bytes: int | None, watch: Watch | None
) -> HandBack | None:
    """Return what was handed back; nothing where that was done already, and only the disk's removal was cut short."""
    image, upper = f"{folder}/{DISK}", f"{folder}/overlay/upper"
    if os.path.lexists(upper):  # it appears whole
        return None
    from cloister.host import vm_hand_back
    from cloister.runs.disk_tools import disk_tools

    return vm_hand_back.hand_back(
        tools or disk_tools(), image, upper, root=workspace, room_bytes=room_bytes, watch=watch
    )


def let_go(image: str) -> bool:
    """Wait until no monitor has a disk open: that of a killed broker lives on a bit. No disk is fine."""
    try:
        descriptor = os.open(image, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        for _ in range(int(_PATIENCE_S / _POLL_S)):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(_POLL_S)
        return False
    finally:
        os.close(descriptor)


def held(folder: str) -> RetryError:
    """Return the error of a disk that a monitor still writes."""
    run = folder.rpartition("/")[2]
    return RetryError(
        "vm-disk-held", "the monitor still holds the workspace's disk", where=run, remedy="the same again"
    )


@contextlib.contextmanager
def turn(folder: str) -> Iterator[None]:
    """Wait until nobody else ends this run's workspace."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
