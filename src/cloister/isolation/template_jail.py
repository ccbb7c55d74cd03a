"""The jail in which a template of guests is made: the bubblewrap argv around a monitor and nothing else.

As `monitor_jail`, but there is no run: no keeper, no box, no socket of the host. Firecracker has one directory to
write, for its own sockets. Pure.
"""

from __future__ import annotations

from cloister.isolation.monitor_jail import FIRECRACKER, VM, Number, own_tmp, under, walls, ways
from cloister.isolation.namespace import SECCOMP_FD, SHIM, proc_of_root, system_mounts

_LOADER_CACHE = "/etc/ld.so.cache"


def template_argv(  # noqa: PLR0913  # each is a part of the jail
    bubblewrap: str, monitor: tuple[str, ...], *, merged_usr: bool, extra_system: tuple[str, ...], kvm: bool, uid: int,
    firecracker: str = "", directory: str = "", number: Number | None = None, shim: str = "",
) -> tuple[str, ...]:  # fmt: skip
    """Return the whole argv; descriptor 3 is the filter of system calls.

    Args:
        bubblewrap: path of bwrap.
        monitor: the monitor's argv.
        merged_usr: whether /bin is a link into /usr.
        extra_system: more directories with programs and libraries, such as /nix/store.
        kvm: the monitor uses /dev/kvm.
        uid: of whoever starts it.
        firecracker: its path on the host; empty where the monitor is QEMU, which lies below `/usr`.
        directory: what it may write, as a run's directory for the monitor's sockets; empty for nothing.
        number: under which it runs where root starts it; None: that of whoever does.
        shim: path of the helper program that takes on that number.
    """
    argv = [bubblewrap, *walls(number), *ways(number, extra_system)]
    for mount in system_mounts(merged_usr, extra_system):
        kind = "--symlink" if mount.kind == "symlink" else "--ro-bind-try" if mount.optional else "--ro-bind"
        argv += [kind, mount.source, mount.target]
    argv += ["--ro-bind-try", _LOADER_CACHE, _LOADER_CACHE, "--proc", "/proc", *proc_of_root(uid)]
    argv += ["--dev", "/dev"]
    if kvm:
        argv += ["--dev-bind-try", "/dev/kvm", "/dev/kvm"]
    if firecracker:
        argv += ["--ro-bind", firecracker, FIRECRACKER]
    argv += own_tmp(number)
    if number:
        argv += ["--ro-bind", shim, SHIM]
    if directory:
        argv += ["--bind", directory, VM]
    return (*argv, "--remount-ro", "/", "--seccomp", str(SECCOMP_FD), "--", *under(number), *monitor)
