"""Choosing the workspace of a run, looking at it and laying it out: what every backend starts with.

Reads the file system as the user whose workspace it is; changes nothing. How a workspace is
protected is decided by `isolation/workspace.py`.
"""

from __future__ import annotations

import hashlib
import os

from cloister.errors import PolicyError, Problem, UsageError
from cloister.host import workspace_probe
from cloister.host.owner import Owner
from cloister.isolation import workspace as workspace_layout
from cloister.plan.workspace import Protected, WorkspaceFacts, WorkspaceLayout
from cloister.policy.model import Agent
from cloister.policy.protected import effective_names
from cloister.runs.paths import Paths

_Question = tuple[WorkspaceFacts, list[Protected], workspace_layout.Options]


class Workspaces:
    """The workspaces of one user. Keeps the last layout, since most runs come from one place."""

    def __init__(self, paths: Paths, owner: Owner) -> None:
        """Look at nothing yet."""
        self._paths = paths
        self._owner = owner
        self._layout: tuple[_Question, WorkspaceLayout] | None = None

    def project(self, directory: str) -> str:
        """Return the project that `directory` is in: the top of the git work tree, else the directory.

        Raises:
            UsageError: there is no such directory.
        """
        real = real_path(directory)
        if not os.path.isdir(real):
            raise UsageError(
                "directory-unusable", "cannot start there: no such directory", where=directory, remedy="cd to a project"
            )
        return workspace_probe.find_project(real, home=self._paths.home)

    def lay_out(
        self, agent: Agent, name: str, directory: str, project: str, admitted: tuple[str, ...]
    ) -> WorkspaceLayout:
        """Choose the root, look at it, and lay it out. It must satisfy the agent's roots and those of `[users]`.

        Raises:
            PolicyError: no root holds the directory.
            DeniedError: it is no fit workspace.
            UsageError: it is being replaced while it is looked at.
        """
        real, paths = real_path(directory), self._paths
        choices = [
            choose_root(agent.workspace.roots, real, project, paths.home, name),
            choose_root(admitted, real, project, paths.home, name, where="[users] roots, in the system's policy"),
        ]
        root = max(choices, key=len)  # each holds the directory, so one holds the other
        protected = _protected(agent)
        options = workspace_layout.Options(
            uid=self._owner.uid,
            home=paths.home,
            reserved=(paths.config, paths.state, paths.runtime),
            hide=tuple(path for path in agent.filesystem.hide if not path.startswith(("/", "~"))),
            unprotected=agent.workspace.unprotected,
            overlay=agent.workspace.mode == "overlay",
        )
        configs = (f"{paths.home}/.gitconfig", f"{os.path.dirname(paths.config)}/git/config", "/etc/gitconfig")
        found = workspace_probe.probe_workspace(
            root,
            workspace_layout.wanted(protected, options),
            uid=self._owner.uid,
            home=paths.home,
            git_configs=configs,
        )
        return self._layout_of(found, protected, options)

    def _layout_of(
        self, found: WorkspaceFacts, protected: list[Protected], options: workspace_layout.Options
    ) -> WorkspaceLayout:
        """Return the layout that follows from what was found; the last one where nothing has changed (0.4 ms)."""
        key = (found, protected, options)
        if self._layout is None or self._layout[0] != key:
            self._layout = (key, workspace_layout.layout(found, protected, options))
        return self._layout[1]


def real_path(path: str) -> str:
    """Return a path without symbolic links (realpath(3)).

    Raises:
        UsageError: what is there changes meanwhile: what was a link is none any more when it is read (EINVAL).
    """
    try:
        return os.path.realpath(path)
    except OSError as error:
        raise UsageError(
            "directory-unusable", f"it is being replaced while it is looked at: {error.strerror}", where=path,
            remedy="try again when it is quiet",
        ) from error  # fmt: skip


def choose_root(  # noqa: PLR0913  # a question with its words
    roots: tuple[str, ...], directory: str, project: str, home: str, agent: str, *, where: str = ""
) -> str:
    """Return the workspace: the project directory, or the longest configured root that holds `directory`.

    With roots, the project is the workspace when it lies in one of them; else the root itself is.

    Raises:
        PolicyError: no root holds the directory; lists the roots, and which of them are missing.
    """
    if not roots:
        return project
    expanded = [(expand((root,), home, relative_to=home)[0], root) for root in roots]
    existing = [path for path, _ in expanded if os.path.isdir(path) and not os.path.islink(path)]
    for path in sorted(existing, key=len, reverse=True):
        if directory == path or directory.startswith(path.rstrip("/") + "/"):
            return project if project.startswith(path.rstrip("/") + "/") or project == path else path
    missing = [root for path, root in expanded if path not in existing]
    shown = "allowed: " + ", ".join(existing or ["none"]) + (f"; missing: {', '.join(missing)}" if missing else "")
    message = f"{directory} is outside the workspaces of {agent!r} ({shown})"
    remedy = "cd into one of them, or " + ("ask for the directory" if where else "add the directory to roots")
    raise PolicyError(
        [Problem(message, where or f".agents.{agent}.workspace.roots", remedy)], reference="workspace-outside-roots"
    )


def project_id(layout: WorkspaceLayout) -> str:
    """Name an agent's state for a project: worktrees of one repository share it, clones do not."""
    anchor = layout.git_dirs[0] if layout.git_dirs else layout.root
    return hashlib.sha256(anchor.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def expand(names: tuple[str, ...], home: str, relative_to: str = "") -> tuple[str, ...]:
    """Return absolute paths: `~` is the home, and what is relative lies below `relative_to`, else below the home."""
    base = relative_to or home
    expanded = (home + name[1:] if name == "~" or name.startswith("~/") else name for name in names)
    return tuple(os.path.normpath(name if name.startswith("/") else f"{base}/{name}") for name in expanded)


def _protected(agent: Agent) -> list[Protected]:
    names = effective_names(agent.workspace.protect, agent.workspace.unprotected)
    return [Protected(entry.name, entry.kind, entry.when, entry.content, entry.why) for entry in names]
