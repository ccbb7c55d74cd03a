"""What is known about a host before Cloister becomes a part of it, as one value.

Facts say what is, never whether that is good: that is for `runs/system_compile.py`. They are taken by
`host/system_probe.py`; what stands at the places of one installation is `plan/system_diff.Found`.
"""

from __future__ import annotations

import msgspec

from cloister.plan.facts import Answer


class KeyFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that the policy names as a secret; its content is nobody's business here."""

    uid: int
    mode: int
    changed: float
    """When, in seconds since the epoch."""
    safe: bool
    """Whether it is a regular file, and only its owner and root could change it or a directory on the way."""


class SystemFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What installing depends on."""

    uid: int
    systemd_booted: bool
    systemd_version: int = 0
    pid1: str = ""
    python: str = ""
    """The interpreter we run in."""
    shim: str = ""
    """Our helper; empty when it was not built with this installation."""
    changeable: str = ""
    """A path of this installation that others than root could change; empty: there is none."""
    nft: str = ""
    attached: tuple[str, ...] = ()
    """Networks that the host has an address in."""
    resolvers: tuple[str, ...] = ()
    """Whom the host asks for names."""
    sysusers: str = ""
    """Path of systemd-sysusers; empty without it."""
    root_links: dict[str, str] = msgspec.field(default_factory=dict)
    root_directories: tuple[str, ...] = ()
    users: dict[str, int] = msgspec.field(default_factory=dict)
    """Users of the policy that the host knows (getpwnam(3)), with their numbers."""
    entries: tuple[tuple[str, int], ...] = ()
    """Users and groups, by files: name and number."""
    subordinate: tuple[str, ...] = ()
    """Names that have subordinate ids (subuid(5))."""
    keys: dict[str, KeyFile] = msgspec.field(default_factory=dict)
    """Files that the policy names as secrets, where they exist."""
    runs: tuple[tuple[str, str], ...] = ()
    """Units of runs that live, with their accounts."""
    proxyd_since: float = 0.0
    """When the system's broker was started, in seconds since the epoch; 0: it does not run."""


class UnitFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the doctor asks about `isolation = "unit"`."""

    systemd_booted: bool
    cgroup_layout: str = "none"
    kernel: str = ""
    idmapped: bool = False
    """Whether the kernel has idmapped mounts (Linux 5.12); the file system must have them too."""
    nft: str = ""
    firewall_loaded: bool = False
    """Whether the unit of the packet filter is installed."""
    hostd_there: bool = False
    hostd_answers: Answer = "unknown"
    bridge: str = ""
    """The network of the bridge of microVMs; empty without one."""
    bridge_moved: bool = False
    """It is another network than the policy's, which this host has elsewhere."""
    no_kernel_events: str = ""
    """Why this installation or this kernel has no kernel events; empty where it has."""
