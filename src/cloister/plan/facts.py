"""Host facts: what is known about this machine, as one value.

Facts are taken once (`host/probe.py`), go into every compilation as an argument, and are kept
with the run's receipt. They say what is, never whether that is good: the judgement is
`runs/doctor.py`, and what a backend needs is the backend's to say.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Answer = Literal["yes", "no", "unknown"]
"""`unknown` means that nobody tried; it never means yes."""


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A program of the host that plans may use."""

    path: str = ""
    """Absolute, empty when there is none."""
    version: str = ""
    """As the program prints it, such as `0.8.0`; empty when it was not asked."""
    refused: str = ""
    """A program of that name that was found and not trusted: somebody but the system's owner could change it."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """Whether something works, learnt by doing it."""

    works: Answer = "unknown"
    reason: str = ""
    """The words of the kernel or of the program when the answer is no."""


class Cgroup(msgspec.Struct, frozen=True, kw_only=True):
    """Where this process stands in the cgroup v2 tree (cgroups(7))."""

    layout: Literal["unified", "hybrid", "legacy", "none"] = "none"
    """`hybrid` has a v2 tree without controllers beside v1 trees."""
    path: str = ""
    """The directory of our own cgroup below the v2 mount; empty without one."""
    base: str = ""
    """A directory in which we may make cgroups and move processes there, with controllers on; empty: none."""
    controllers: tuple[str, ...] = ()
    """What cgroups made in `base` have, such as memory, pids, cpu."""
    manager: tuple[str, ...] = ()
    """What scopes have that our systemd manager makes (root's is the system's); empty without a manager."""


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the backends and the doctor ask about the host."""

    kernel: str
    """Release, such as `6.12.9-amd64`."""
    arch: str
    """As `uname -m` prints it."""
    uid: int
    """Effective user id of the prober: a fact about one user may be wrong for another."""
    bwrap: Program = Program()
    shim: Program = Program()
    """Our own helper, `cloister-shim`."""
    pasta: Program = Program()
    nft: Program = Program()
    tun: bool = False
    """Whether we may open /dev/net/tun, which pasta makes its tap device with."""
    systemd: Program = Program()
    """`systemctl`, whose version is systemd's."""
    systemd_booted: bool = False
    """Whether systemd is the running service manager (sd_booted(3))."""
    systemd_user: bool = False
    """Whether this user has a systemd manager of its own."""
    pid1: str = ""
    """Name of process 1 as this process sees it."""
    container: str = ""
    """Which container manager made the environment we run in, if it says so."""
    namespaces: Trial = Trial()
    """Whether bubblewrap can make all the namespaces of a run, with a fresh /proc."""
    user_namespaces_max: int = 0
    """user.max_user_namespaces."""
    userns_clone: bool = True
    """kernel.unprivileged_userns_clone of Debian's older kernels; true where it does not exist."""
    apparmor_userns: bool = False
    """kernel.apparmor_restrict_unprivileged_userns is on (Ubuntu 23.10 and later)."""
    proc_masked: tuple[str, ...] = ()
    """Mounts over parts of /proc, as container managers make them; they forbid fresh ones in user namespaces."""
    seccomp: bool = False
    """Whether filters that answer with error numbers can be loaded."""
    landlock_abi: int = 0
    """0 means: not there."""
    lsms: tuple[str, ...] = ()
    """Security modules in force; empty when securityfs is not mounted."""
    cgroup: Cgroup = Cgroup()
    overlay: Trial = Trial()
    """Whether an overlay can be mounted in a user namespace."""
    btf: bool = False
    """Whether the kernel describes its types (/sys/kernel/btf/vmlinux), as eBPF programs of ours need."""
    kvm: Trial = Trial()
    """Whether a guest runs, which an openable /dev/kvm does not prove."""
    root_links: dict[str, str] = msgspec.field(default_factory=dict)
    """Links among the system directories of /, such as bin to usr/bin; name to target."""
    root_directories: tuple[str, ...] = ()
    """System directories of / that are real directories, such as usr, etc, nix."""
