"""Why something is mounted, or allowed: the policy's line behind a mount or an egress rule."""

from __future__ import annotations

import re

from cloister.plan.workspace import WorkspaceLayout
from cloister.policy.merge import ResolvedAgent
from cloister.runs.explain import Access

_RULE = re.compile(r"\] (allow|deny|private)\[(\d+)\]")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32", "/nix/store", "/gnu/store")


class Reasons:
    """The reasons of one agent in one workspace."""

    def __init__(self, written: ResolvedAgent, layout: WorkspaceLayout, home: str, state: str) -> None:
        """Take the agent as its policy was written (before a project file narrowed it), and the workspace's layout."""
        self._written = written
        self._layout = layout
        self._home = home
        self._state = state

    def of_path(self, access: Access) -> str:
        """Return why a path is as it is, with the policy's line where there is one."""
        at = access.mount
        if not at:
            return "nothing is mounted there, and what is not mounted does not exist in the sandbox"
        for key in ("read", "write", "hide"):
            for index, name in enumerate(getattr(self._written.agent.filesystem, key)):
                if self._expand(name) == at:
                    return self._line(("filesystem", key, index), f"filesystem.{key}")
        for index, name in enumerate(self._written.agent.carry):
            if self._expand(name) == at:
                return self._line(("carry", index), "carried in from the home, read-only")
        for mount in self._layout.mounts:
            if mount.target == at and at != self._layout.root:
                return (
                    f"protected in every workspace: {mount.why}"
                    if mount.why
                    else "part of the workspace's git directory"
                )
        return self._general(access)

    def _general(self, access: Access) -> str:
        at = access.mount
        if at == self._layout.root:
            return self._line(("workspace",), "the workspace")
        if access.source.startswith(self._state + "/"):
            return f"the agent's own state for this project, kept in {self._state}"
        fixed = {
            self._home: "a fresh home that holds only what is carried in",
            "/tmp": "the sandbox's own",  # noqa: S108  # its name inside
            "/etc": "a small copy of /etc, the same in every sandbox",
            "/proc": "the sandbox's own",
            "/dev": "the sandbox's own",
        }
        if at in fixed:
            return fixed[at]
        if at in ("/", "/home", "/run", "/var"):
            return "nothing of the host is mounted there"
        if at in _SYSTEM:
            return "a system directory, read-only in every sandbox"
        if at.startswith("/run/cloister"):
            return "made for this run"
        return "the agent's program"

    def of_rule(self, rule: str, egress: object = None) -> str:
        """Return where a rule was written; `rule` is a verdict's, such as `x.org ([agents.a.egress] allow[2])`."""
        found = _RULE.search(rule)
        if not found:
            return ""
        key, index = found[1], int(found[2])
        entries = getattr(self._written.agent.egress, key)
        narrowed = getattr(egress, key, entries)
        entry = narrowed[index] if index < len(narrowed) else None
        if entry not in entries:
            return ".cloister.toml of this project"
        return self._written.source(("egress", key, entries.index(entry)))

    def _line(self, path: tuple[str | int, ...], what: str) -> str:
        where = self._written.source(path)
        return f"{what} ({where})" if where else what

    def _expand(self, name: str) -> str:
        plain = name.rstrip("/")
        if plain.startswith("~/"):
            return self._home + plain[1:]
        return plain if plain.startswith("/") else f"{self._home}/{plain}"
