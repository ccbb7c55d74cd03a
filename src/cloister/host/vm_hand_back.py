"""What a guest changed on its workspace's disk, written as an overlay's upper directory: the form that reviews know.

`cloister diff|apply|discard` read that directory as they read any overlay's (`overlay_review`), with all they refuse
and ask. The guest is hostile and so is its disk. It is read by a child of this process that has given up everything but
the disk and the directory to write to (`disk_work`, `confine_self`); an unclean one is replayed first, in a jail.
"""

from __future__ import annotations

import base64
import contextlib
import os

from cloister.errors import UnsupportedError
from cloister.host import beneath, overlay_apply, vm_baseline
from cloister.host.disk_child import SILENCE_S, Watch, in_child
from cloister.host.e2fs import Tools
from cloister.host.overlay_review import MAX_CHANGES
from cloister.host.vm_image import REPLAYED, SPARE_BYTES, clean_disk
from cloister.plan.workspace import Value


class HandBack(Value, frozen=True):
    """What was handed back."""

    changes: int
    """Names in the upper directory, without directories that only lead to others."""
    notices: tuple[str, ...] = ()
    """What the person should know, one sentence each."""


def hand_back(  # noqa: PLR0913  # a disk, its way back, and who waits
    tools: Tools, image: str, upper: str, *, root: str, room_bytes: int | None = None, watch: Watch | None = None
) -> HandBack:
    """Write the changes on the disk `image` against its baseline into the new directory `upper`.

    It is made whole or not at all: a try that was cut short is begun anew. The image stays; see `drop`.

    Args:
        tools: e2fsprogs in their jail, for a disk that its guest left unclean; and the reader's filter.
        image: the disk; nobody may be writing it.
        upper: where to write; the directory above it is made.
        root: the workspace on the host, whose directories give their modes to those that only lead to changes.
        room_bytes: no more content than this (limits.disk_max).
        watch: who waits for it.

    Raises:
        DeniedError: the disk is not the file system that it says, or its baseline is gone.
        DiskToolError: it is unclean and cannot be replayed.
        RetryError: the watch has ended it.
        StepError: what reads it has died.
        UnsupportedError: there are more changes than are reviewed, or than there is room for.
    """
    folder, _, name = upper.rpartition("/")
    partial = f".{name}.partial"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    try:
        overlay_apply.discard(folder, (partial,))
        os.mkdir(f"{folder}/{partial}", 0o700)
        with contextlib.ExitStack() as stack:
            baseline = _owned(stack, vm_baseline.open_baseline(image))
            target = _owned(stack, beneath.open_root(f"{folder}/{partial}"))
            disk = _owned(stack, stack.enter_context(clean_disk(tools, image)))
            descriptors = {"image": disk, "baseline": baseline, "target": target}
            with contextlib.suppress(OSError):  # it may be gone: then nothing has its directories' modes
                descriptors["root"] = _owned(stack, beneath.open_root(root, flags=beneath.THROUGH))
            order = {
                "filter": base64.b64encode(tools.filters.reader).decode(), "room": _room(target, room_bytes),
                "most": MAX_CHANGES, "where": upper,
            }  # fmt: skip
            back = in_child("hand-back", order, HandBack, descriptors=descriptors, watch=watch, silence_s=SILENCE_S)
        os.rename(f"{folder}/{partial}", upper)
    except OSError as error:
        _clear(folder, partial)
        raise refused(f"they cannot be written: {error.strerror}", upper) from error
    except BaseException:
        _clear(folder, partial)
        raise
    return back


def _owned(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _clear(folder: str, partial: str) -> None:
    """Make room again after a try that failed; what stays is removed by the next one."""
    with contextlib.suppress(OSError):
        overlay_apply.discard(folder, (partial,))
        os.rmdir(folder)  # no other changes lie in it


def drop(image: str) -> None:
    """Remove a disk that was handed back, and its baseline; the baseline last, since nothing is handed back without."""
    tidy(image)
    for path in (image, f"{image}{vm_baseline.SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def tidy(image: str) -> None:
    """Remove what is left of work on a disk that was killed; what is whole stays."""
    gone = [f"{image}.partial", f"{image}{REPLAYED}", f"{image}{vm_baseline.SUFFIX}{vm_baseline.NEW}"]
    if not os.path.lexists(image):  # the disk appears after its baseline
        gone.append(f"{image}{vm_baseline.SUFFIX}")
    for path in gone:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def refused(why: str, where: str) -> UnsupportedError:
    """Return the error of a hand-back for which there is no room, or something like it."""
    return UnsupportedError(
        "vm-hand-back", f"the virtual machine's changes are still on its disk, and {why}", where=where,
        remedy="make room, then: cloister diff RUN",
    )  # fmt: skip


def _room(target: int, room_bytes: int | None) -> int:
    free = os.fstatvfs(target)
    room = max(0, free.f_bavail * free.f_frsize - SPARE_BYTES)
    return room if room_bytes is None else min(room, room_bytes)
