"""The workspace as values: what was found there, what will be mounted, what must be made first.

Three vocabularies meet here. *Facts* (`WorkspaceFacts` and its parts) are what
`host/workspace_probe.py` saw. A *layout* is what `isolation/workspace.py` makes of them: mounts in
order, placeholders that must exist before mounting, and notes for people. `Protected` is one
entry of the list of names an agent may not write. Nothing here reads the machine or decides.

Paths are absolute host paths as `str` in the file system encoding with surrogateescape
(PEP 383). The sandbox shows the workspace at its host path, because git worktrees, compilers
and agents record absolute paths.
"""

from __future__ import annotations

from typing import Literal

import msgspec

NodeKind = Literal["absent", "file", "directory", "symlink", "other"]
"""What lstat(2) says of a name; `other` is a socket, FIFO or device."""

GIT_NAMES = ("HEAD", "hooks", "config", "config.worktree", "commondir", "worktrees", "modules")
"""Names below a git directory that decide where git runs code from; see gitrepository-layout(5)."""

WORKTREE_NAMES = ("commondir", "gitdir", "config.worktree")
"""Names below `.git/worktrees/NAME` that matter here; see git-worktree(1), "Details"."""


class Value(msgspec.Struct, frozen=True):
    """What all values here share: they do not change."""


class Node(Value, frozen=True):
    """One name in a directory, as lstat(2) saw it."""

    kind: NodeKind = "absent"
    dev: int = 0
    ino: int = 0

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode, or None where there is nothing."""
        return None if self.kind == "absent" else (self.dev, self.ino)


ABSENT = Node()


class Protected(Value, frozen=True):
    """One path below the workspace that the agent may read but not write."""

    name: str
    """Relative path, such as `.vscode` or `.cargo/config.toml`."""
    kind: Literal["file", "directory"] = "file"
    """What to put there while it is absent; what exists is protected as whatever it is."""
    when: Literal["always", "present"] = "always"
    """`always` protects the name also while nothing is there; `present` only what exists at start."""
    content: str = ""
    """What the agent reads from an absent file."""
    why: str = ""
    """Who loads it, in a few words; shown in plans."""


class Worktree(Value, frozen=True):
    """One entry of `.git/worktrees`."""

    name: str
    node: Node
    nodes: dict[str, Node]
    inside: bool = False
    """Its checkout is the workspace or lies in it, so the agent may commit there."""


class GitDir(Value, frozen=True):
    """A git directory that holds objects, references and configuration (git's *common directory*)."""

    path: str
    node: Node
    nodes: dict[str, Node]
    worktrees: tuple[Worktree, ...] = ()
    modules: tuple[GitDir, ...] = ()
    """Git directories of submodules, found below `modules/`."""
    alternates: bool = False
    """It borrows objects from another repository (`objects/info/alternates`)."""
    elsewhere: bool = False
    """Its `commondir` file names another directory, so its configuration is not here."""
    bounded: bool = False
    """There are more worktrees or submodules than were looked at; the rest stays read-only."""


class Nested(Value, frozen=True):
    """A `.git` below the workspace's top: another repository, a submodule or a worktree."""

    name: str
    """Path of the `.git` relative to the workspace."""
    node: Node
    directory: GitDir | None = None
    """Set when `.git` is a directory that looks like a repository and was looked at."""


GitShape = Literal["none", "clone", "pointer", "bare"]
"""`pointer`: `.git` is a file naming a directory elsewhere (worktree, submodule, --separate-git-dir)."""


class WorkspaceFacts(Value, frozen=True):
    """What is in a workspace, as far as protecting it needs to know."""

    root: str
    node: Node
    owner: int
    """Numeric user id of the root's owner."""
    writable: bool
    nodes: dict[str, Node]
    """Every protected name, and each of its parent directories, relative to the root."""
    git: Node = ABSENT
    shape: GitShape = "none"
    directory: GitDir | None = None
    """The common directory of the workspace's own repository."""
    pointer_problem: str = ""
    """Why a `.git` file cannot be trusted: it names a directory that does not name this workspace."""
    configured: tuple[Protected, ...] = ()
    """What git's configuration loads from inside the workspace: `core.hooksPath`, `include.path`."""
    nested: tuple[Nested, ...] = ()
    scan_complete: bool = True
    """Whether the scan for nested repositories saw every directory within its depth."""


class Mount(Value, frozen=True):
    """One mount of the sandbox, in the order in which it must be made.

    `bind`     source onto target, writable.
    `pin`      a directory onto itself, writable: a mount point cannot be renamed or removed
               (EBUSY, rename(2)), so what lies below it stays where it is.
    `ro`       source onto target, read-only.
    `content`  a read-only file holding `content`.
    `mask`     hidden: an empty, unreadable directory or file.
    `overlay`  the run's copy-on-write view of source onto target; where that is kept is not said here.
    """

    op: Literal["bind", "pin", "ro", "content", "mask", "overlay"]
    target: str
    source: str = ""
    node: Node = ABSENT
    """What `source` was when it was looked at; `ABSENT` for what a placeholder will make."""
    content: str = ""
    why: str = ""

    def describe(self) -> str:
        """Return one line for plans."""
        place = self.target if self.source in {"", self.target} else f"{self.source} at {self.target}"
        return f"{self.op} {place}" + (f" ({self.why})" if self.why else "")


class Placeholder(Value, frozen=True):
    """Something to make on the host before mounting, and to remove after the run.

    A `socket` is a Unix socket inode nobody listens on: git ignores it, readers get ENXIO instead
    of blocking, and a file can be mounted over it. Inside git directories a `file` is made
    instead, because git dies of a `commondir` or `config.worktree` it cannot open.
    """

    base: str
    """Absolute path of the workspace or git directory it lies in."""
    base_node: Node
    name: str
    """Path relative to `base`."""
    kind: Literal["socket", "directory", "file"]
    content: str = ""


class WorkspaceLayout(Value, frozen=True):
    """How a workspace will be shown to the agent."""

    root: str
    mounts: tuple[Mount, ...]
    placeholders: tuple[Placeholder, ...]
    """In the order in which to make them: parents first."""
    git_dirs: tuple[str, ...] = ()
    """Every writable git directory, for the comparison after the run."""
    unprotected: tuple[str, ...] = ()
    """Names left writable on request; the audit records them."""
    notes: tuple[str, ...] = ()
    """What the person should know, one sentence each."""
