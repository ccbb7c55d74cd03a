"""How a workspace is shown to the agent: facts and the list of protected names in, mounts out.

The agent may write the workspace, but nothing that a tool of its owner loads and runs later: git
hooks and configuration, editor and agent settings. Those are mounted read-only, also while they
are absent. What mounts cannot prevent (a new repository in a new directory) is looked for after
the run (`host/tripwires.py`). git's own directories are in `isolation/git_layout.py`; making
placeholders is for `host/placeholders.py`. Pure: nothing here touches the machine.

The workspace of a repository is the top of its work tree: git's index, ignore rules and hooks
cover the whole tree, and a repository seen without its top is not one to git. Where a policy
names a directory below the top, that directory is shown without git.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cloister.errors import DeniedError
from cloister.isolation.git_layout import lay_out_git, lay_out_git_behind
from cloister.isolation.mounts import Builder
from cloister.plan.workspace import Protected, Value, WorkspaceFacts, WorkspaceLayout

_UNFIT = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")
"""Control characters, and the surrogates that stand for bytes which are not UTF-8 (PEP 383)."""

SYSTEM_TREES = (
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/nix/store", "/proc", "/sbin", "/sys", "/usr",
)  # fmt: skip
"""Nothing in these is a project."""

SYSTEM_PLACES = (
    "/home", "/media", "/mnt", "/nix", "/opt", "/root", "/run", "/run/user", "/srv", "/tmp",  # noqa: S108 (named in order to be refused)
    "/var", "/var/cache", "/var/lib", "/var/log", "/var/tmp",  # noqa: S108 (same)
)  # fmt: skip
"""These hold other people's things; a directory below them may be a project."""


class Options(Value, frozen=True):
    """What besides the facts decides a layout."""

    uid: int
    home: str
    reserved: tuple[str, ...] = ()
    """Cloister's own configuration, state and runtime directories."""
    overlay: bool = False
    """Changes are kept aside for review, so nothing needs protection in place."""
    hide: tuple[str, ...] = ()
    """Relative paths to mask."""
    unprotected: tuple[str, ...] = ()
    """Names (`.vscode`, `.git/hooks`) to leave writable: a named opt-out."""


def layout(facts: WorkspaceFacts, protected: Iterable[Protected], options: Options) -> WorkspaceLayout:
    """Decide how the workspace is mounted.

    Raises:
        DeniedError: the directory is no fit workspace, or a protected path is a symbolic link.
    """
    refuse_place(facts, options)
    builder = Builder(facts, options.unprotected)
    builder.add_root(overlay=options.overlay)
    if options.overlay:
        lay_out_git_behind(builder)
    else:
        _protect(builder, protected)
    for name in options.hide:
        builder.hide(name)
    return builder.finish()


def _protect(builder: Builder, protected: Iterable[Protected]) -> None:
    facts = builder.facts
    lay_out_git(builder)
    for entry in {entry.name: entry for entry in [*facts.configured, *protected]}.values():
        if entry.name == ".":
            raise DeniedError(
                "git-hooks-path",
                f"{entry.why} names the workspace itself, so every file in it would be a hook",
                where=facts.root,
                remedy="git config --unset core.hooksPath, or use a directory of its own such as .githooks",
            )
        builder.protect(entry)
    if not facts.scan_complete:
        builder.note("the workspace is large: nested repositories may exist that were not seen before the run")


def refuse_place(facts: WorkspaceFacts, options: Options) -> None:
    """Refuse directories that are no project, whatever is in them.

    Raises:
        DeniedError: with the reason.
    """
    root = facts.root
    if _UNFIT.search(root):
        message = "the workspace's path holds control characters or is not UTF-8"
        raise DeniedError("workspace-name", message, where=root, remedy="rename the directory")
    project = "cd into a project directory"
    if root == "/" or root in SYSTEM_PLACES or _within_any(root, SYSTEM_TREES):
        raise DeniedError("workspace-system", "a system directory is no workspace", where=root, remedy=project)
    if _within(options.home, root):
        message = "the home directory, or one that holds it, is no workspace: the agent would own all of it"
        raise DeniedError("workspace-home", message, where=root, remedy=project)
    for place in options.reserved:
        if _within(place, root) or _within(root, place):
            message = "the workspace and Cloister's own files would overlap"
            raise DeniedError("workspace-reserved", message, where=f"{root} and {place}", remedy=project)
    if facts.owner != options.uid:
        message = f"the workspace belongs to user {facts.owner}, not to you"
        raise DeniedError("workspace-owner", message, where=root, remedy="work in a copy that is yours")
    if not facts.writable:
        message = "you cannot write to the workspace"
        raise DeniedError("workspace-read-only", message, where=root, remedy=f"chmod u+rwx {root}")


def wanted(protected: Iterable[Protected], options: Options) -> list[str]:
    """Return the names a probe must look at for `layout` to decide."""
    return [*(entry.name for entry in protected), *options.hide]


def _within(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")


def _within_any(path: str, places: Iterable[str]) -> bool:
    return any(_within(path, place) for place in places)
