"""The mounts of a workspace, collected in any order and handed out parents first.

It knows three rules of the kernel and nothing of git or policy: a mount point cannot be renamed or
removed (EBUSY), a directory that merely contains one can be renamed (so every directory above a
protected path is pinned), and a mount follows symbolic links (so links are refused).
"""

from __future__ import annotations

from typing import Literal

from cloister.errors import DeniedError
from cloister.plan.workspace import (
    ABSENT,
    Mount,
    Node,
    Placeholder,
    Protected,
    Value,
    WorkspaceFacts,
    WorkspaceLayout,
)


class Base(Value, frozen=True):
    """Where a protected name lies: the workspace or a git directory."""

    path: str
    node: Node
    label: str = ""
    """What `workspace.unprotected` calls it, with a final slash; empty for the workspace."""
    file: Literal["socket", "file"] = "socket"
    """What stands for an absent file; see `Placeholder`."""


class Builder:
    """Collects mounts, placeholders and notes for one workspace."""

    def __init__(self, facts: WorkspaceFacts, unprotected: tuple[str, ...]) -> None:
        """Start with nothing mounted; `unprotected` names are skipped wherever they would be protected."""
        self.facts = facts
        self.base = Base(facts.root, facts.node)
        self._unprotected = frozenset(name.strip("/") for name in unprotected)
        self._used: set[str] = set()
        self._mounts: dict[str, Mount] = {}
        self._placeholders: dict[str, Placeholder] = {}
        self._git_dirs: list[str] = []
        self._notes: list[str] = []

    def add_root(self, *, overlay: bool = False) -> None:
        """Show the workspace itself, writable, or a copy-on-write view of it."""
        root = self.facts.root
        self.mount(Mount("overlay" if overlay else "bind", root, root, self.facts.node, why="workspace"))

    def mount(self, made: Mount) -> None:
        """Add a mount unless its target has one."""
        self._mounts.setdefault(made.target, made)

    def note(self, text: str) -> None:
        """Add a sentence for the person."""
        self._notes.append(text)

    def writable_git_dir(self, path: str) -> None:
        """Remember a git directory the agent may write."""
        self._git_dirs.append(path)

    def opted_out(self, label: str) -> bool:
        """Whether the policy leaves this name, or a directory above it, writable; recorded when so."""
        parts = label.split("/")
        for depth in range(1, len(parts) + 1):
            name = "/".join(parts[:depth])
            if name in self._unprotected:
                self._used.add(name)
                return True
        return False

    def protect(self, entry: Protected) -> None:
        """Make one path of the workspace read-only, and keep it where it is.

        Raises:
            DeniedError: the path or a directory above it is a symbolic link.
        """
        name = entry.name.strip("/")
        node = self.facts.nodes.get(name, ABSENT)
        if self.opted_out(name) or self._covered(name) or (node.kind == "absent" and entry.when == "present"):
            return
        if not self.pin_above(name):
            return
        self.protect_in(self.base, entry, node)

    def protect_in(self, base: Base, entry: Protected, node: Node) -> None:
        """Make the direct or pinned child `entry.name` of `base`, found as `node`, read-only.

        Raises:
            DeniedError: it is a symbolic link.
        """
        label = f"{base.label}{entry.name}"
        if self.opted_out(label):
            return
        target = f"{base.path}/{entry.name}"
        refuse_link(target, node, label)
        kind: Literal["socket", "directory", "file"] = "directory" if entry.kind == "directory" else base.file
        missing = node.kind in {"absent", "other"}
        # Another run of the same workspace may have made what the probe saw, so whatever could be
        # a placeholder is listed: the second run shares it, and the first cannot remove it early.
        if kind != "socket" or missing:
            self._placeholders.setdefault(target, Placeholder(base.path, base.node, entry.name, kind, entry.content))
        if kind == "socket" and missing:
            self.mount(Mount("content", target, content=entry.content, why=entry.why))
        else:
            self.mount(Mount("ro", target, target, node, why=entry.why))

    def pin_above(self, name: str) -> bool:
        """Pin every directory between the workspace and `name`.

        Returns False when something above is no directory: then that is protected, and nothing can be below it.

        Raises:
            DeniedError: a directory above is a symbolic link.
        """
        root = self.facts.root
        parts = name.split("/")
        for depth in range(1, len(parts)):
            part = "/".join(parts[:depth])
            node = self.facts.nodes.get(part, ABSENT)
            refuse_link(f"{root}/{part}", node, part)
            if node.kind in {"file", "other"}:
                self.mount(Mount("ro", f"{root}/{part}", f"{root}/{part}", node, why=f"stands above {name}"))
                return False
            if f"{root}/{part}" not in self._mounts:
                self._placeholders.setdefault(f"{root}/{part}", Placeholder(root, self.facts.node, part, "directory"))
            self.mount(Mount("pin", f"{root}/{part}", f"{root}/{part}", node, why=f"above {name}"))
        return True

    def hide(self, name: str) -> None:
        """Mask a path of the workspace, if it is there.

        Raises:
            DeniedError: the path or a directory above it is a symbolic link.
        """
        name = name.strip("/")
        parts = name.split("/")
        for depth in range(1, len(parts) + 1):
            part = "/".join(parts[:depth])
            if self.facts.nodes.get(part, ABSENT).kind == "symlink":
                message = "a path to hide is a symbolic link, or lies behind one"
                where = f"{self.facts.root}/{part}"
                raise DeniedError("hide-symlink", message, where=where, remedy="hide what the link points to")
        node = self.facts.nodes.get(name, ABSENT)
        if node.kind == "absent":
            self.note(f"{name} is to be hidden but is not there")
            return
        target = f"{self.facts.root}/{name}"
        below = [other for other in self._mounts if other.startswith(f"{target}/")]
        for other in [target, *below]:
            self._mounts.pop(other, None)
            self._placeholders.pop(other, None)
        self.mount(Mount("mask", target, node=node, why="hidden"))

    def finish(self) -> WorkspaceLayout:
        """Return the layout: mounts and placeholders sorted by path components, so parents come first."""
        return WorkspaceLayout(
            root=self.facts.root,
            mounts=tuple(self._mounts[key] for key in sorted(self._mounts, key=_components)),
            placeholders=tuple(self._placeholders[key] for key in sorted(self._placeholders, key=_components)),
            git_dirs=tuple(dict.fromkeys(self._git_dirs)),
            unprotected=tuple(sorted(self._used)),
            notes=tuple(dict.fromkeys(self._notes)),
        )

    def _covered(self, name: str) -> bool:
        """Whether a read-only mount on the path or above it protects it already."""
        parts = name.split("/")
        above = ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        mounts = (self._mounts.get(f"{self.facts.root}/{part}") for part in above)
        return any(mount is not None and mount.op in {"ro", "content", "mask"} for mount in mounts)


def refuse_link(path: str, node: Node, label: str) -> None:
    """Refuse a protected path that is a symbolic link: a mount would follow it to wherever it points.

    Raises:
        DeniedError: it is one.
    """
    if node.kind == "symlink":
        raise DeniedError(
            "workspace-symlink",
            "a protected path is a symbolic link, which cannot be protected in place",
            where=path,
            remedy=f'replace the link, or set workspace.mode = "overlay", or workspace.unprotected = ["{label}"]',
        )


def _components(path: str) -> list[str]:
    return path.split("/")
