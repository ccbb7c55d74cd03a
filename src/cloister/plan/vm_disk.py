"""What of a workspace's layout is on a guest's disk though the host does not have it, and what the guest must hold.

A layout (`isolation/workspace.py`) speaks of mounts on a host. A guest has a disk instead: names that are hidden, or
protected while absent, are put onto it, and the guest is told which to keep read-only. Pure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal, NamedTuple

from cloister.plan.workspace import WorkspaceLayout


class Virtual(NamedTuple):
    """Something that is on the disk and not on the host, or instead of what is there."""

    kind: Literal["file", "directory", "socket"]
    """A socket is what git takes for nothing: the guest shows a file there (`stand`)."""
    mode: int
    content: bytes = b""
    replaces: bool = False
    """It stands for something hidden; else only for what is absent."""


def virtual_names(layout: WorkspaceLayout) -> dict[bytes, dict[bytes, Virtual]]:
    """Return what is on the disk and not on the host: by directory, by name."""
    found: dict[bytes, dict[bytes, Virtual]] = {}
    for place in layout.placeholders:
        target = f"{place.base}/{place.name}"
        if place.kind == "directory":
            made = Virtual("directory", 0o755)
        elif place.kind == "socket":
            made = Virtual("socket", 0o600)
        else:
            made = Virtual("file", 0o644, place.content.encode())
        _put(found, layout.root, target, made)
    for mount in layout.mounts:
        if mount.op == "mask":
            kind: Literal["file", "directory"] = "directory" if mount.node.kind == "directory" else "file"
            _put(found, layout.root, mount.target, Virtual(kind, 0, replaces=True))
    return found


def _put(found: dict[bytes, dict[bytes, Virtual]], root: str, target: str, made: Virtual) -> None:
    if target != root and within(target, root):
        place, _, name = os.fsencode(target[len(root) + 1 :]).rpartition(b"/")
        found.setdefault(place, {})[name] = made


def held(layout: WorkspaceLayout) -> Iterator[tuple[str, str]]:
    """Yield what the guest is to keep read-only (`ro`) or masked (`mask`), relative to the workspace.

    `stand` is a file that it shows in the place of a socket: its content in hex, a colon, and the name.
    """
    for mount in layout.mounts:
        if mount.target == layout.root or not within(mount.target, layout.root):
            continue
        name = mount.target[len(layout.root) + 1 :]
        if mount.op == "ro":
            yield "ro", name
        elif mount.op == "content":
            yield "stand", f"{mount.content.encode().hex()}:{name}"
        elif mount.op == "mask":
            yield "mask", name


def within(path: str, root: str) -> bool:
    """Whether a path is a directory, or below it, by its text."""
    return path == root or path.startswith(root.rstrip("/") + "/")
