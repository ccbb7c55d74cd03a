"""The child of `disk_child`: fills a workspace's disk, or reads what a guest has written. Used there only.

Whatever reads a guest's bytes confines itself before the first of them, when everything it needs is open and imported.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from cloister.errors import StepError
from cloister.host import vm_baseline
from cloister.host.child_main import Tell
from cloister.host.confine_self import FILLS, confine_self
from cloister.host.ext4.image import Image
from cloister.host.vm_changes import Back
from cloister.host.vm_pack import Pack

_LARGEST_BYTES = 1 << 44
"""Of one file that a guest can have: ext4 counts 2^32 blocks of 4 KiB, holes among them."""


def _fill(order: dict[str, Any], tell: Tell) -> object:
    from cloister.host.e2fs import Tools
    from cloister.host.vm_workspace import make_workspace_disk
    from cloister.plan.workspace import WorkspaceLayout

    return make_workspace_disk(
        msgspec.convert(order["tools"], Tools), msgspec.convert(order["layout"], WorkspaceLayout), order["target"],
        room_bytes=order["room"], uid=order["uid"], gid=order["gid"], tell=tell,
    )  # fmt: skip


def _hand_back(order: dict[str, Any], tell: Tell) -> object:
    from cloister.host.vm_hand_back import HandBack, refused

    held = order["descriptors"]
    baseline = vm_baseline.read(held["baseline"], order["where"])
    confine_self(base64.b64decode(order["filter"]), {held["target"]: FILLS}, file_bytes=_LARGEST_BYTES)
    try:
        with Image(held["image"]) as image:
            back = Back(
                image, baseline, held["target"], root=held.get("root", -1), room=order["room"], most=order["most"],
                tell=tell,
            )  # fmt: skip
            back.write()
            return HandBack(back.changes, tuple(back.notices()))
    except OSError as error:
        raise refused(f"they cannot be written: {error.strerror}", order["where"]) from error


def _pack(order: dict[str, Any], tell: Tell) -> object:
    held = order["descriptors"]
    confine_self(base64.b64decode(order["filter"]), {}, file_bytes=0)
    try:
        with Image(held["image"]) as image:
            return Pack(image, held["sink"], tell).send(base64.b64decode(order["name"]))
    except OSError as error:
        raise StepError("vm-take", f"the copy has ended: {error.strerror}") from error


WORKS = {"fill": _fill, "hand-back": _hand_back, "pack": _pack}
"""For `child_main`."""
