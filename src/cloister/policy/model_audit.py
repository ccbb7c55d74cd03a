"""The tables of a policy that are about detections: what in the audit's log is worth telling somebody.

Part of the model (`policy/model.py`), in a file of its own. The rules that come with Cloister are written in the same
words (`audit/rules.toml`). Which kinds of events there are is known to `audit/detect_rules.py`, which checks them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from cloister.policy.table import Port, Table

Action = Literal["record", "alarm", "stop"]
Grade = Literal["informational", "low", "medium", "high", "critical"]
Times = Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Conditions(Table, frozen=True, kw_only=True):
    """`[audit.rules.after]`: what an event must be; all that is named must hold, of a list any one."""

    kinds: tuple[str, ...] = ()
    """Kinds of events, as `file.opened`, or `file` for all of them; at least one."""
    agents: tuple[str, ...] = ()
    """Patterns for the agent's name, as of glob(7); here and below `*` stands for `/` too."""
    users: tuple[str, ...] = ()
    """Patterns for the name of the person whose run it is."""
    paths: tuple[str, ...] = ()
    """Patterns for the file; one that does not begin with `/` or `*` matches below any directory, as `.ssh/id_*`."""
    not_paths: tuple[str, ...] = ()
    """Patterns for files that are not meant after all."""
    hosts: tuple[str, ...] = ()
    """Patterns for the name or the address of a host."""
    not_hosts: tuple[str, ...] = ()
    """Patterns for hosts that are not meant after all."""
    ports: tuple[Port, ...] = ()
    """Ports of the other side."""
    programs: tuple[str, ...] = ()
    """Patterns for the program of the process, as `paths`."""
    not_programs: tuple[str, ...] = ()
    """Patterns for programs that are not meant after all. Name them by their whole path: an agent can call a program
    of its own anything, but cannot put it into `/usr/bin`."""
    arguments: tuple[str, ...] = ()
    """Patterns for the command line, its arguments joined by spaces."""
    decisions: tuple[Literal["allowed", "blocked", "asked"], ...] = ()
    """What was decided."""
    reasons: tuple[str, ...] = ()
    """Patterns for the kebab-case reason."""
    writes: bool | None = None
    """Whether a file was opened for writing."""
    failed: bool | None = None
    """Whether it failed (errno), where that is known."""
    details: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """Patterns for details of the event, by name; of `a|b` either may match."""


class DetectionRule(Conditions, frozen=True, kw_only=True):
    """`[[audit.rules]]`: a detection of your own. What matches is recorded as `detection.matched`."""

    name: str
    """Its name, in kebab-case; no other rule may have it."""
    title: str = ""
    """What it means, in a few words."""
    severity: Grade = "medium"
    """How bad it is."""
    action: Action = "record"
    """`record` puts it into the log, `alarm` also sends it where alarms go, `stop` also ends the run."""
    count: Times = 1
    """How often it must happen within `within` before it matches."""
    within: str = "1m"
    """The time in which `count` is counted, and in which `after` must have come before."""
    per: Literal["run", "agent", "process"] = "run"
    """What `count` is counted for."""
    first: Literal["", "host", "path", "program"] = ""
    """Match only where the agent was not seen with this host, file or program before."""
    after: Conditions | None = None
    """What the same process, or the one that made it, must have done before."""
    every: str = "1m"
    """A run matches a rule at most once in this time; what comes meanwhile is counted, and told with the next match or
    when the run ends."""
