"""Filling a workspace's disk in a child of this process, which serves others meanwhile; see `vm_workspace` for how."""

from __future__ import annotations

import msgspec

from cloister.host.disk_child import Watch, in_child
from cloister.host.e2fs import Tools
from cloister.host.vm_hand_back import drop
from cloister.host.vm_workspace import WorkspaceDisk
from cloister.plan.workspace import WorkspaceLayout


def fill(  # noqa: PLR0913  # a disk has so many sides
    tools: Tools, layout: WorkspaceLayout, target: str, *, room_bytes: int, uid: int, gid: int,
    watch: Watch | None = None,
) -> WorkspaceDisk:  # fmt: skip
    """Make the file `target`, an image with the workspace, and its baseline beside it, as `make_workspace_disk` does.

    Raises:
        CloisterError: as there; or the watch has ended it. Nothing is left of it.
    """
    order = {
        "tools": msgspec.to_builtins(tools), "layout": msgspec.to_builtins(layout), "target": target,
        "room": room_bytes, "uid": uid, "gid": gid,
    }  # fmt: skip
    try:
        return in_child("fill", order, WorkspaceDisk, descriptors={}, watch=watch)
    except BaseException:
        drop(target)
        raise
