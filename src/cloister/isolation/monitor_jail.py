"""The jail of a virtual machine's monitor: the bubblewrap argv around the keeper and QEMU or Firecracker.

A monitor that its guest has taken over finds: no network, no home, no workspace, `/usr` read-only, the run's sockets,
which its guest has anyway, one directory of its own, and the files it was handed by descriptor. System calls are
filtered as an agent's are, no capability is left, and no user namespace can be made. Pure.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import msgspec

from cloister.isolation.inner import BOX, CLOISTER_DIR
from cloister.isolation.namespace import CONTROL_FD, SECCOMP_FD, SHIM, proc_of_root, system_mounts

VM = f"{CLOISTER_DIR}/vm"
"""Where the run's directory for the console and the monitor's sockets appears."""
FIRECRACKER = f"{CLOISTER_DIR}/firecracker"
"""Where Firecracker appears: it may lie anywhere on the host."""
CONSOLE_BYTES = 256 << 10
"""Kept of what a guest prints; as much again of what it printed before."""
PATIENCE_S = 120
"""For a guest to say hello and report its walls: a busy host that emulates it needs a tenth of that."""
_LOADER_CACHE = "/etc/ld.so.cache"


class Number(msgspec.Struct, frozen=True):
    """Under which number a monitor runs that root starts."""

    uid: int
    """As user and as group."""
    groups: tuple[int, ...] = ()
    """Whose files it may use as well: that of /dev/kvm."""


class Jail(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides what the jail looks like."""

    bubblewrap: str
    shim: str
    box_directory: str
    vm_directory: str
    merged_usr: bool
    extra_system: tuple[str, ...] = ()
    uid: int
    gid: int
    kvm: bool
    """The monitor uses /dev/kvm, the one device of the host in there."""
    sockets: tuple[str, ...]
    """Of the box: what programs in the guest may connect to."""
    published: tuple[tuple[int, int], ...] = ()
    """Listening descriptors, each with the port of the guest that it stands for."""
    vsock: str = ""
    """Firecracker's socket for the channel, as seen in the jail; empty where the channel is a descriptor."""
    adopt: int | None = None
    """The highest number of a command of the run that this one goes on from; None: its guest begins."""
    firecracker: str = ""
    """Its path on the host; empty where the monitor is QEMU, which lies below `/usr`."""
    monitor: tuple[str, ...]
    """The monitor's argv."""
    number: Number | None = None
    """None: it runs under that of whoever starts it."""


def jail_argv(jail: Jail) -> tuple[str, ...]:
    """Return the whole argv: bubblewrap, its options, the keeper with its own, the monitor's."""
    argv = [jail.bubblewrap, *walls(jail.number)]
    if jail.number is None:
        argv += ["--uid", str(jail.uid), "--gid", str(jail.gid)]
    argv += ["--as-pid-1", *ways(jail.number, jail.extra_system)]
    for mount in system_mounts(jail.merged_usr, jail.extra_system):
        kind = "--symlink" if mount.kind == "symlink" else "--ro-bind-try" if mount.optional else "--ro-bind"
        argv += [kind, mount.source, mount.target]
    argv += ["--ro-bind-try", _LOADER_CACHE, _LOADER_CACHE, "--proc", "/proc", *proc_of_root(jail.uid)]
    argv += ["--dev", "/dev"]
    if jail.kvm:
        argv += ["--dev-bind-try", "/dev/kvm", "/dev/kvm"]
    if jail.firecracker:
        argv += ["--ro-bind", jail.firecracker, FIRECRACKER]
    argv += own_tmp(jail.number)
    argv += ["--ro-bind", jail.shim, SHIM, "--ro-bind", jail.box_directory, BOX, "--bind", jail.vm_directory, VM]
    argv += ["--remount-ro", "/", "--seccomp", str(SECCOMP_FD), "--"]
    return (*argv, *under(jail.number), *_keeper(jail))


def walls(number: Number | None) -> list[str]:
    """Return bubblewrap's options for namespaces and capabilities.

    A number that is not root's needs two capabilities until it is taken on, and a user namespace with one number has no
    second one: there is none then. The filter of system calls lets nobody make any.
    """
    argv = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--unshare-net"]
    argv += ["--hostname", "monitor", "--die-with-parent", "--cap-drop", "ALL"]
    if number is None:
        return ["--unshare-user", "--disable-userns", *argv]
    return [*argv, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]


def ways(number: Number | None, extra_system: tuple[str, ...]) -> list[str]:
    """Return the options for directories on the way to what is mounted: bubblewrap's own are open to its user only."""
    if number is None:
        return []
    shown = (SHIM, _LOADER_CACHE, *extra_system)
    found = {str(way): None for path in shown for way in reversed(PurePosixPath(path).parents)}
    return [word for way in found if way != "/" for word in ("--perms", "0755", "--dir", way)]


def own_tmp(number: Number | None) -> list[str]:
    """Return the options for a /tmp that nobody else sees."""
    mode = "0700" if number is None else "1777"  # it is made before the number is taken on
    return ["--perms", mode, "--size", str(16 << 20), "--tmpfs", "/tmp"]  # noqa: S108  # the jail's own


def under(number: Number | None) -> list[str]:
    """Return the words before a program that is to begin under a number."""
    if number is None:
        return []
    return [SHIM, "as", str(number.uid), *map(str, number.groups), "--"]


def _keeper(jail: Jail) -> list[str]:
    argv = [SHIM, "keeper", "--ctl", str(CONTROL_FD), "--box", BOX]
    for name in jail.sockets:
        argv += ["--socket", name]
    for descriptor, port in jail.published:
        argv += ["--publish", f"{descriptor}:{port}"]
    argv += ["--console", f"{VM}/console.log", "--console-bytes", str(CONSOLE_BYTES)]
    argv += ["--patience", str(PATIENCE_S)]
    if jail.vsock:
        argv += ["--vsock", jail.vsock]
    if jail.adopt is not None:
        argv += ["--adopt", str(jail.adopt)]
    return [*argv, "--", *jail.monitor]
