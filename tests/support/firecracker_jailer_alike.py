"""A look-alike of Firecracker's jailer: the same flags, strict as the real one, and the same deeds.

    jailer --id ID --exec-file PATH --uid N --gid N [--chroot-base-dir DIR] [--netns PATH] [--parent-cgroup P]
           [--cgroup FILE=VALUE]… [--cgroup-version 1|2] [--resource-limit NAME=VALUE]… [--daemonize] [--new-pid-ns]
           [-- ARGUMENTS]

It really makes the chroot, enters it by pivot_root(2), joins the network namespace, gives up root and executes. What it
does beyond the real one: since the look-alike of Firecracker is no static program, /usr is bound into the chroot, and
/dev has null, zero and urandom. Cgroups are made below JAILER_ALIKE_CGROUPS. Standard library only; run as root.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import resource
import shutil
import stat
import sys
import time
from pathlib import Path

CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MS_RDONLY, MS_REMOUNT, MNT_DETACH = 0x1000, 0x4000, 0x40000, 1, 0x20, 2
PIVOT_ROOT = 155
LIMITS = {"fsize": resource.RLIMIT_FSIZE, "no-file": resource.RLIMIT_NOFILE}
LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Do everything, and become Firecracker."""
    arguments, rest = parse(sys.argv[1:])
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2:
            try:
                os.close(number)
            except OSError:
                continue
    name = Path(arguments.exec_file).name
    root = Path(arguments.chroot_base_dir, name, arguments.id, "root")
    root.mkdir(parents=True, exist_ok=True)
    shutil.copy(arguments.exec_file, root / name)
    limit(arguments.resource_limit)
    cgroups(arguments, name)
    if arguments.netns:
        descriptor = os.open(arguments.netns, os.O_RDONLY)
        called(LIBC.setns(descriptor, CLONE_NEWNET), "setns")
        os.close(descriptor)
    enter(root)
    devices(arguments.uid, arguments.gid)
    for path in ("/", f"/{name}"):
        os.chown(path, arguments.uid, arguments.gid)
    if arguments.new_pid_ns:
        called(LIBC.unshare(CLONE_NEWPID), "unshare")
        child = os.fork()
        if child:
            Path(f"/{name}.pid").write_text(str(child), encoding="ascii")
            os._exit(0)
        called(LIBC.mount(b"proc", b"/proc", b"proc", 0, None), "mount proc")
    os.setgroups([])
    os.setresgid(arguments.gid, arguments.gid, arguments.gid)
    os.setresuid(arguments.uid, arguments.uid, arguments.uid)
    now = str(time.monotonic_ns() // 1000)
    words = [f"--id={arguments.id}", f"--start-time-us={now}", "--start-time-cpu-us=1", *rest]
    kept = {key: value for key, value in os.environ.items() if key.startswith("FIRECRACKER_ALIKE_")}
    os.execve(f"/{name}", [name, *words], {"PATH": "/usr/bin:/usr/sbin", **kept})  # noqa: S606


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and what is Firecracker's, as strictly as the real one."""
    rest: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, rest = words[:at], words[at + 1 :]
    parser = argparse.ArgumentParser(prog="jailer", allow_abbrev=False)
    for name in ("--id", "--exec-file"):
        parser.add_argument(name, required=True)
    for name in ("--uid", "--gid"):
        parser.add_argument(name, required=True, type=int)
    parser.add_argument("--chroot-base-dir", default="/srv/jailer")
    parser.add_argument("--netns")
    parser.add_argument("--parent-cgroup")
    parser.add_argument("--cgroup", action="append", default=[])
    parser.add_argument("--cgroup-version", default="1", choices=("1", "2"))
    parser.add_argument("--resource-limit", action="append", default=[])
    parser.add_argument("--daemonize", action="store_true")
    parser.add_argument("--new-pid-ns", action="store_true")
    found = parser.parse_args(words)
    judge(parser, found)
    return found, rest


def judge(parser: argparse.ArgumentParser, found: argparse.Namespace) -> None:
    """End with an error where the real one would."""
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", found.id):
        parser.error("Invalid instance ID")
    if "firecracker" not in Path(found.exec_file).name:
        parser.error("The file name must contain the word firecracker")
    if not Path(found.exec_file).is_file() or not Path(found.chroot_base_dir).is_dir():
        parser.error("Failed to canonicalize path")
    for each in found.cgroup:
        if not re.fullmatch(r"[a-z]+\.[a-z_.]+=[^=]+", each):
            parser.error(f"Invalid format for cgroups: {each}")
    for each in found.resource_limit:
        name, _, value = each.partition("=")
        if name not in LIMITS or not value.isdigit():
            parser.error(f"Invalid format for resources: {each}")


def limit(wanted: list[str]) -> None:
    """Set what the process may use up."""
    bounds = {"no-file": 2048} | {each.partition("=")[0]: int(each.partition("=")[2]) for each in wanted}
    for name, value in bounds.items():
        resource.setrlimit(LIMITS[name], (value, value))


def cgroups(arguments: argparse.Namespace, name: str) -> None:
    """Make the run's cgroup, set its files, and enter it."""
    base = Path(os.environ.get("JAILER_ALIKE_CGROUPS", "/sys/fs/cgroup"))
    own = base / (arguments.parent_cgroup or name) / arguments.id
    if not arguments.cgroup and not arguments.parent_cgroup:
        return
    own.mkdir(parents=True, exist_ok=True)
    for each in arguments.cgroup:
        file, _, value = each.partition("=")
        (own / file).write_text(value, encoding="ascii")
    (own / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")


def enter(root: Path) -> None:
    """Make `root` the root of a mount namespace, with nothing of the old one reachable."""
    called(LIBC.unshare(CLONE_NEWNS), "unshare")
    called(LIBC.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount private")
    target = os.fsencode(root)
    called(LIBC.mount(target, target, None, MS_BIND, None), "bind")
    for place in ("usr", "proc", "tmp"):
        (root / place).mkdir(exist_ok=True)
    called(LIBC.mount(b"/usr", os.fsencode(root / "usr"), None, MS_BIND | MS_REC, None), "bind /usr")
    called(LIBC.mount(None, os.fsencode(root / "usr"), None, MS_BIND | MS_REMOUNT | MS_RDONLY, None), "read-only")
    for link in ("bin", "lib", "lib64"):
        if not (root / link).is_symlink():
            (root / link).symlink_to(f"usr/{link}")
    (root / "old_root").mkdir()
    os.chdir(root)
    called(LIBC.syscall(PIVOT_ROOT, b".", b"old_root"), "pivot_root")
    called(LIBC.umount2(b"old_root", MNT_DETACH), "umount")
    Path("old_root").rmdir()
    os.chroot(".")


def devices(uid: int, gid: int) -> None:
    """Make the devices of the jail."""
    Path("/dev/net").mkdir(parents=True, exist_ok=True)
    made = {"kvm": (10, 232), "net/tun": (10, 200), "null": (1, 3), "zero": (1, 5), "urandom": (1, 9)}
    for name, (major, minor) in made.items():
        os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o600, os.makedev(major, minor))
        os.chown(f"/dev/{name}", uid, gid)


def called(result: int, what: str) -> None:
    """Raise what a call of the C library says."""
    if result < 0:
        raise OSError(ctypes.get_errno(), what)


if __name__ == "__main__":
    main()
