"""The `namespace` backend: what a sandbox looks like, and the bubblewrap argv that builds it.

The root file system is an allowlist. It starts as an empty tmpfs; system directories are
bound read-only, `/etc` is a small assembled copy, `/tmp`, `/run`, `/dev` and `/proc` are
fresh, the home is an empty tmpfs that holds only what was carried in, and the workspace lies
at its own path. What is not mounted does not exist, so there is no list of secrets to keep
up to date. Mount order is the order of this file.

Options are those of bwrap(1), version 0.8.0 or newer. Nothing runs here.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cloister.isolation.inner import (
    BOX,
    CLOISTER_DIR,
    PROBE_ADDRESS,
    Inner,
    inner_argv,
)

BIN = f"{CLOISTER_DIR}/bin"
SHIM = f"{CLOISTER_DIR}/shim"
SECCOMP_FD = 3
CONTROL_FD = 4

MountKind = Literal["ro", "rw", "tmpfs", "symlink", "directory", "private-directory", "mask-file", "mask-directory"]


class Mount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing in the sandbox's file system. `source` is a host path, or a symlink's target; tmpfs has none."""

    kind: MountKind
    target: str
    source: str = ""
    optional: bool = False


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides what the sandbox looks like, as facts and choices already made."""

    bubblewrap: str
    shim: str
    box_directory: str
    etc_directory: str
    home: str
    uid: int
    gid: int
    hostname: str
    system: tuple[Mount, ...]
    mounts: tuple[Mount, ...]
    programs: tuple[tuple[str, str], ...] = ()
    """Names put on the agent's PATH, with the paths they stand for."""
    tmpfs_bytes: int | None = None
    network: Literal["empty", "shared"] = "empty"
    """`shared` keeps the network namespace that the outer shim made (egress mode `internet`)."""
    models: bool = False
    """Model traffic is served as well, on a port of its own."""
    nested: bool = False
    landlock: Literal["available", "required", "off"] = "available"
    landlock_rw: tuple[str, ...] = ()
    mdwe: bool = False
    rlimits: tuple[tuple[str, int], ...] = ()
    notify: Literal["", "calls", "files"] = ""
    probe_write: tuple[str, ...] = ("/usr",)
    probe_connect: tuple[str, ...] = (PROBE_ADDRESS,)


def system_mounts(merged: bool, extra: tuple[str, ...] = ()) -> tuple[Mount, ...]:
    """Return the system directories: one bind where `/bin` and friends are links into `/usr`, else one for each."""
    roots = ("bin", "sbin", "lib", "lib64", "lib32", "libx32")
    usr = (Mount("ro", "/usr", "/usr"),)
    if merged:
        links = tuple(Mount("symlink", f"/{name}", f"usr/{name}") for name in roots[:4])
    else:
        links = tuple(Mount("ro", f"/{name}", f"/{name}", optional=True) for name in roots)
    return usr + links + tuple(Mount("ro", path, path, optional=True) for path in extra)


def bubblewrap_argv(box: Box) -> tuple[str, ...]:
    """Return the whole argv: bubblewrap, its options, and the inner shim with its own."""
    argv = [box.bubblewrap, *_namespaces(box)]
    for mount in box.system:
        argv += _mount(mount)
    argv += ["--ro-bind", box.etc_directory, "/etc", "--proc", "/proc", *proc_of_root(box.uid), "--dev", "/dev"]
    size = ["--size", str(box.tmpfs_bytes)] if box.tmpfs_bytes is not None else []
    argv += ["--perms", "1777", *size, "--tmpfs", "/tmp"]  # noqa: S108  # the sandbox's own, fresh
    if size:  # what --dev makes there has the kernel's default: half of the host's memory
        argv += ["--perms", "1777", *size, "--tmpfs", "/dev/shm"]  # noqa: S108  # the sandbox's own, fresh
    argv += ["--dir", "/var", *_var_tmp(box), "--dir", "/run"]
    argv += ["--perms", "0700", *size, "--tmpfs", box.home]
    argv += ["--ro-bind", box.shim, SHIM, "--ro-bind", box.box_directory, BOX]
    for name, path in box.programs:
        argv += ["--symlink", path, f"{BIN}/{name}"]
    for mount in box.mounts:
        argv += _mount(mount)
    argv += ["--remount-ro", "/", "--seccomp", str(SECCOMP_FD), "--", *_inner(box)]
    return tuple(argv)


def _var_tmp(box: Box) -> list[str]:
    """Make `/var/tmp` a link to `/tmp`, which saves a mount; where the workspace lies below it, a directory."""
    if any(mount.target.startswith("/var/tmp/") for mount in box.mounts):  # noqa: S108
        return ["--dir", "/var/tmp"]  # noqa: S108
    return ["--symlink", "../tmp", "/var/tmp"]  # noqa: S108


def _namespaces(box: Box) -> list[str]:
    """Unshare everything. The outer shim is the parent, so dying with it means dying with the run."""
    argv = ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if box.network == "empty":
        argv.append("--unshare-net")
    if not box.nested:
        argv.append("--disable-userns")
    argv += ["--uid", str(box.uid), "--gid", str(box.gid), "--hostname", box.hostname]
    return [*argv, "--die-with-parent", "--as-pid-1", "--cap-drop", "ALL"]


def proc_of_root(uid: int) -> list[str]:
    """Cover what belongs to root in `/proc` where root runs a sandbox: its files need no capability, only their owner.

    Bubblewrap covers these directories only where they are writable themselves (bubblewrap.c, SETUP_MOUNT_PROC),
    which they are not; `/proc/sys/kernel/core_pattern` in them is, and it names a program that the kernel runs.
    """
    if uid != 0:
        return []
    names = ("sys", "irq", "bus", "sysrq-trigger")
    return [word for name in names for word in ("--ro-bind-try", f"/proc/{name}", f"/proc/{name}")]


def _mount(mount: Mount) -> list[str]:
    suffix = "-try" if mount.optional else ""
    match mount.kind:
        case "ro":
            return [f"--ro-bind{suffix}", mount.source, mount.target]
        case "rw":
            return [f"--bind{suffix}", mount.source, mount.target]
        case "tmpfs":
            return ["--tmpfs", mount.target]
        case "symlink":
            return ["--symlink", mount.source, mount.target]
        case "directory":
            return ["--dir", mount.target]
        case "private-directory":
            return ["--perms", "0700", "--dir", mount.target]
        case "mask-file":
            return ["--ro-bind", "/dev/null", mount.target]
        case "mask-directory":
            return ["--perms", "0000", "--tmpfs", mount.target, "--remount-ro", mount.target]


def _inner(box: Box) -> tuple[str, ...]:
    inner = Inner(
        control=CONTROL_FD,
        models=box.models,
        nested=box.nested,
        landlock=box.landlock,
        landlock_rw=box.landlock_rw,
        mdwe=box.mdwe,
        rlimits=box.rlimits,
        notify=box.notify,
        probe_write=box.probe_write,
        probe_connect=box.probe_connect,
    )
    return inner_argv(SHIM, inner)
