"""What the user's own broker says of a run under systemd: the part that is the user's to decide.

It crosses `cloister-hostd` unread and is judged by the system's broker. By lying here a user harms the own
workspace only: every path below is either relative to the workspace's descriptor, or a name.
"""

from __future__ import annotations

import msgspec

from cloister.plan.workspace import WorkspaceLayout


class UserPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The user's part of a request."""

    layout: WorkspaceLayout
    """The workspace as it was looked at, with what is protected; `root` is where the workspace's descriptor leads."""
    project: str
    """16 hexadecimal digits (`runs.workspaces.project_id`): worktrees of one repository share them."""
    project_policy: str = ""
    """The text of `.cloister.toml` in the workspace, which may only tighten."""
    own_policy: str = ""
    """The user's own policy, where it has the agent: narrower than the system's, or refused."""
    git: tuple[tuple[str, str], ...] = ()
    """The user's git identity and safe directories."""
    extra_names: tuple[str, ...] = ()
    """Variables named on the command line (`--env`), to carry in beside those of the policy."""
    variables: tuple[tuple[str, str], ...] = ()
    """Variables of the product's own file below the home: they count least. No secrets, but not to be stored either."""
    notices: tuple[str, ...] = ()
    """What there is to say to the user of files of the home."""
    copied: bool = False
    """In overlay mode: the directory for changes holds a copy of the workspace, to be shown in its place."""
    carried: tuple[tuple[str, str], ...] = ()
    """Names in the carried tar that are mounted over the home, each with `file` or `directory`."""
