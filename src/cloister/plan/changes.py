"""What a run in overlay mode changed, as values, and which of it may be applied without being asked for by name.

A `Change` says what differs between the workspace and the run's copy; finding changes is for
`host/overlay_review.py`, writing them for `host/overlay_apply.py`. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from cloister.plan.workspace import NodeKind, Value

GIT_STATE = ("objects", "refs", "logs")
GIT_STATE_FILES = (
    "HEAD", "ORIG_HEAD", "FETCH_HEAD", "MERGE_HEAD", "MERGE_MSG", "MERGE_MODE", "AUTO_MERGE", "SQUASH_MSG",
    "COMMIT_EDITMSG", "index", "packed-refs", "REBASE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD",
)  # fmt: skip
"""What git writes when one commits. Everything else below `.git` may make git run something."""


LEADS_OUT = "a symbolic link that leads out of the workspace"
SYSTEM_PROGRAMS = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib64/")


class Stamp(Value, frozen=True):
    """How something in the workspace looked when it was reviewed."""

    kind: NodeKind = "absent"
    mode: int = 0
    """Permission bits, with set-user-id, set-group-id and sticky."""
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    ino: int = 0


class Change(Value, frozen=True):
    """One path that differs."""

    path: str
    """Relative to the workspace."""
    op: Literal["added", "modified", "deleted", "replaced"]
    """`replaced`: another kind of thing is there now, such as a link where a file was."""
    kind: NodeKind
    """What the run has there; `absent` when deleted."""
    before: Stamp
    """What the workspace has there."""
    mode: int = 0
    size: int = 0
    link: str = ""
    """Target, where the run has a symbolic link."""
    conflict: bool = False
    """The workspace's side changed after the run began."""
    asks: str = ""
    """Why it is applied only when asked for: a protected name, a link that leads out."""
    never: str = ""
    """Why it is never applied: a device, a name too deep."""


def asks(path: str, kind: NodeKind, link: str, names: Iterable[str]) -> str:
    """Return why a change must be asked for by name, or nothing.

    `names` are the protected ones; a name counts in every directory, since tools load their settings from the
    directory they are opened in.
    """
    parts = path.split("/")
    folded = path.casefold()  # `.GIT` is `.git` on a casefolded file system
    if ".git" in folded.split("/"):
        at = folded.split("/").index(".git")
        return (
            ""
            if at == 0 and parts[0] == ".git" and kind != "symlink" and _git_state(parts[1:], kind)
            else "git may run what it says"
        )
    if parts[-1].casefold() == "head" and kind != "directory":
        return "it can make a directory look like a git repository"
    padded = f"/{folded}/"
    for name in names:
        if f"/{name.casefold()}/" in padded:
            return "tools on your machine load it by themselves"
    if kind == "symlink" and leads_out(path, link):
        return LEADS_OUT
    return ""


def leads_out(path: str, link: str) -> bool:
    """Whether a link at `path` with the target `link` leaves the workspace by its own text."""
    if link.startswith("/"):
        return True
    depth = path.count("/")
    for part in link.split("/"):
        if part == "..":
            depth -= 1
        elif part not in {"", "."}:
            depth += 1
        if depth < 0:
            return True
    return False


def at_system_program(link: str) -> bool:
    """Whether a link's target is a path of the system's own programs, by its text: what a virtual environment links."""
    return link.startswith(SYSTEM_PROGRAMS) and ".." not in link.split("/")


def _git_state(parts: list[str], kind: NodeKind) -> bool:
    """Whether a path below `.git` only records history."""
    if not parts:
        return kind == "directory"
    if parts[0] == "objects":
        return parts[-1] not in {"alternates", "http-alternates"}
    if parts == ["info", "refs"]:
        return kind == "file"  # `git gc` writes it, for those who fetch by plain HTTP; nothing here reads it
    return parts[0] in GIT_STATE or (len(parts) == 1 and parts[0] in GIT_STATE_FILES)
