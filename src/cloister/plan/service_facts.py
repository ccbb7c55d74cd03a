"""What is known about a host before units of gateways are written for it, as values; and those files, as values.

Facts say what is, never whether that is good: that is for `runs/service_files.py`.
"""

from __future__ import annotations

import msgspec


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all values here share."""


class SourceFile(Value, frozen=True):
    """A file that root declared for a gateway."""

    text: str
    executable: bool = False


class ProgramFacts(Value, frozen=True):
    """An agent's program on this host: the file, what must be shown for it, names to put on the PATH."""

    path: str
    binds: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()


class ServiceFacts(Value, frozen=True):
    """What the units of gateways depend on."""

    systemd: int
    """Major version of the service manager."""
    machine: str
    """As uname(2) names it."""
    shim: str
    """Path of our shim."""
    merged_usr: bool = True
    links: dict[str, str] = msgspec.field(default_factory=dict)
    """Links among the system directories of /, such as bin to usr/bin."""
    shell: str = "/bin/bash"
    """A shell that the host has: gateways start their tools through it."""
    hostname: str = "cloister"
    programs: dict[str, ProgramFacts] = msgspec.field(default_factory=dict)
    """By the agent's name, where its program was found."""
    sources: dict[str, dict[str, SourceFile]] = msgspec.field(default_factory=dict)
    """By path: the directories that a policy names, where they could be read."""
    unreadable: dict[str, str] = msgspec.field(default_factory=dict)
    """By path: why one could not."""
    taken: frozenset[int] = frozenset()
    """Ports of gateways that another program holds."""
    tools: frozenset[str] = frozenset()
    """Names of programs in /usr/bin and /bin, of those that a policy names."""


class ServiceFile(Value, frozen=True):
    """A file of root's that shall be there, whole."""

    path: str
    text: str
    mode: int = 0o644
    account: str = ""
    """The account whose group may read it; empty: root's."""


class ServiceUnits(Value, frozen=True):
    """What is installed for one gateway."""

    joined: str
    account: str
    files: tuple[ServiceFile, ...]
    directories: tuple[str, ...]
    """Of root's, 0755, parents first."""
    enabled: tuple[str, ...]
    """Units that are started with the system, in this order."""
    passive: tuple[str, ...]
    """Units that others start."""
    restart_for: tuple[str, ...]
    """Files whose change restarts the gateway."""
