"""The other half of `support.machines`: a program that boots a root file system with systemd as PID 1, and watches it.

    python machine_boot.py '{"name": …, "lower": […], "scratch": …, "hybrid": …, "binds": [[host, inside]…]}'

Not a container manager: the machine's root is this machine's root, without the power over its clock, modules and
sysctls. It lives in PID, mount, network, IPC, UTS and cgroup namespaces of its own; its file system is an overlay whose
upper layer, like /home, /var, /srv and /root (which must be idmapped, or be an upper layer themselves), is on a tmpfs
in this program's mount namespace. So all of it goes with this program, however that ends: standard input is the
lifeline, PID 1 gets SIGKILL when its parent dies, and cgroups left over by one that was killed are removed by the next.

It prints lines: `up PID`, `ready PID` (systemd's READY=1: the boot has finished), `cgroup PATH` for each cgroup that
visitors from outside belong into, `down STATUS`. It reads one word: `cut` (kill PID 1, boot again). A reboot that the
machine asked for itself, which arrives as SIGHUP (reboot(2)), boots again.

Standard library only, and Linux ≥ 5.12 (as the tests' interpreter is 3.11, there is no os.unshare yet).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LIBC = ctypes.PyDLL(None, use_errno=True)  # PyDLL holds the interpreter's lock: the clone below must not lose it
CLONE_NUMBER = {"x86_64": 56, "aarch64": 220}
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = 4096, 16384, 1 << 18, 1 << 20
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP = 1, 24
WITHHELD = {"sys_module": 16, "sys_rawio": 17, "sys_time": 25, "mknod": 27}
"""Powers that no namespace confines: over modules, ports, the one clock of the host, and its disks by new device files.

Nobody in a machine may have them: PID 1 drops them here, and who enters from outside must drop them as well.
"""
PIVOT_ROOT_NUMBER = {"x86_64": 155, "aarch64": 41}

PREFIX = "cloister-test-"
OWN = ("home", "var", "srv", "root")
"""Folders that are no part of the overlay: overlayfs can be neither idmapped nor an upper layer of another overlay."""
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


class Hierarchy(NamedTuple):
    """One mounted cgroup hierarchy.

    Attributes:
        controllers: those of v1, `name=systemd` among them; empty for v2.
        home: the cgroup that this program came from.
        place: where to make ours: at home, but v2 at the top, where alone it may have both processes and controllers.
    """

    controllers: str
    home: Path
    place: Path


def check(result: int) -> int:
    """Return what a system call returned; raises OSError where it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount something, as the system call of this name does."""
    try:
        check(
            LIBC.mount(
                source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None
            )
        )
    except OSError as error:
        raise OSError(error.errno, f"mount {source} on {target}: {error.strerror}") from error


def bind(source: str, target: str, flags: int = 0) -> None:
    """Bind `source` to `target`, with the flags of a remount, if any."""
    mount(source, target, flags=MS_BIND | MS_REC)
    if flags:
        mount("none", target, flags=MS_BIND | MS_REMOUNT | flags)


# ---- cgroups ----


def hierarchies() -> list[Hierarchy]:
    """Return this machine's hierarchies."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines())
    found: dict[str, Hierarchy] = {}
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields, _, rest = line.partition(" - ")
        top, kind, options = Path(fields.split()[4]), rest.split()[0], rest.split()[-1].split(",")
        for controllers, path in own.items():
            home = top / path.lstrip("/")
            if kind == "cgroup2" and not controllers:
                found.setdefault("", Hierarchy("", home, top))
            elif kind == "cgroup" and controllers and set(controllers.split(",")) <= set(options):
                found.setdefault(controllers, Hierarchy(controllers, home, home))
    return list(found.values())


def remove(cgroup: Path) -> None:
    """End what runs in a cgroup of ours and below it, and remove it; waits for the kernel for up to 5 s."""
    until = time.monotonic() + 5
    while cgroup.exists():
        below = [Path(folder) for folder, _, _ in os.walk(cgroup)]  # unlike rglob(), at peace with folders that vanish
        for folder in sorted({*below, cgroup}, reverse=True):
            with contextlib.suppress(OSError):
                for pid in (folder / "cgroup.procs").read_text(encoding="utf-8").split():
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                folder.rmdir()
        if time.monotonic() > until:
            return
        time.sleep(0.01)


def started(pid: str) -> str:
    """Return when a process was started, in clock ticks; empty when there is none (proc_pid_stat(5), field 22)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""


def remove_stale(every: list[Hierarchy]) -> None:
    """Remove cgroups whose program was killed before it could."""
    for hierarchy in every:
        for cgroup in hierarchy.place.glob(f"{PREFIX}*"):
            pid, when = cgroup.name.removeprefix(PREFIX).split("-")[:2]
            if started(pid) != when:
                remove(cgroup)


class Cgroups:
    """The cgroups of one boot.

    Attributes:
        shown: the hierarchies that the machine gets to see.
        visitors: files `cgroup.procs` for those who enter from outside.
    """

    def __init__(self, every: list[Hierarchy], boot: int, *, hybrid: bool) -> None:
        """Make one in each hierarchy that the machine is to see."""
        self._name = f"{PREFIX}{os.getpid()}-{started(str(os.getpid()))}-{boot}"
        self.shown = [one for one in every if hybrid or not one.controllers]
        self.visitors = []
        for one in self.shown:
            folder = one.place / self._name
            folder.mkdir()
            if "cpuset" in one.controllers.split(","):
                for file in ("cpuset.cpus", "cpuset.mems"):
                    (folder / file).write_text((one.place / file).read_text(encoding="utf-8"), encoding="utf-8")
            # A cgroup v2 with controllers has processes in its leaves only.
            room = folder / "visitors" if one.controllers in {"", "name=systemd"} else folder
            room.mkdir(exist_ok=True)
            self.visitors.append(room / "cgroup.procs")

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Be in them for the length of the block: what is cloned there has them as its root."""
        try:
            for one in self.shown:
                (one.place / self._name / "cgroup.procs").write_text("0", encoding="utf-8")
            yield
        finally:
            for one in self.shown:
                (one.home / "cgroup.procs").write_text("0", encoding="utf-8")

    def remove(self) -> None:
        """Remove them with all that runs in them."""
        for one in self.shown:
            remove(one.place / self._name)


# ---- what PID 1 does before it becomes systemd ----


def build_root(spec: dict[str, Any], store: str, shown: list[Hierarchy]) -> None:
    """Mount the machine's file systems, and make them the root."""
    root = f"{store}/merged"
    layers = f"lowerdir={':'.join(spec['lower'])},upperdir={store}/upper,workdir={store}/work"
    mount("overlay", root, "overlay", 0, f"{layers},index=off,xino=off,metacopy=off")
    for name in OWN:
        bind(f"{store}/own/{name}", f"{root}/{name}")
    os.chdir(root)
    mount_proc_and_sys()
    mount_cgroups(shown, hybrid=spec["hybrid"])
    mount("tmpfs", "run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    mount("tmpfs", "tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    mount_devices()
    mount_host_folder(store)
    for outside, inside in spec["binds"]:
        target = f"{root}{inside}"
        Path(target).mkdir(parents=True, exist_ok=True)
        bind(outside, target, MS_RDONLY)
    check(LIBC.syscall(PIVOT_ROOT_NUMBER[platform.machine()], b".", b"."))
    check(LIBC.umount2(b".", MNT_DETACH))
    os.chdir("/")
    # What PID 1 expects: credentials of units need propagation.
    mount("none", "/", flags=MS_REC | MS_SHARED)


def mount_proc_and_sys() -> None:
    """Mount /proc, with the host's sysctls and SysRq out of reach, and /sys, read-only: nothing looks for devices."""
    mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    bind("proc/sys", "proc/sys", MS_RDONLY)
    bind("proc/sys/net", "proc/sys/net")  # those of its own network namespace
    mount("none", "proc/sys/net", flags=MS_BIND | MS_REMOUNT)
    if Path("proc/sysrq-trigger").exists():
        bind("proc/sysrq-trigger", "proc/sysrq-trigger", MS_RDONLY)
    mount("sysfs", "sys", "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def mount_cgroups(shown: list[Hierarchy], *, hybrid: bool) -> None:
    """Mount cgroups as systemd expects to find them."""
    base = "sys/fs/cgroup"
    if not hybrid:
        mount("cgroup2", base, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        return
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755")
    for controllers in (one.controllers for one in shown):
        place = f"{base}/{controllers.removeprefix('name=') or 'unified'}"
        Path(place).mkdir()
        data = f"none,{controllers}" if controllers.startswith("name=") else controllers
        kind = "cgroup" if controllers else "cgroup2"
        mount("cgroup", place, kind, MS_NOSUID | MS_NODEV | MS_NOEXEC, data)
        if "," in controllers:
            for one in controllers.split(","):
                Path(f"{base}/{one}").symlink_to(controllers)


def mount_devices() -> None:
    """Mount a /dev with a few harmless devices and terminals of its own."""
    mount("tmpfs", "dev", "tmpfs", MS_NOSUID, "mode=755")
    for name in DEVICES:
        if Path(f"/dev/{name}").exists():
            target = Path(f"dev/{name}")
            target.parent.mkdir(exist_ok=True)
            target.touch()
            bind(f"/dev/{name}", str(target))
    # Not the host's: there it may be root's only, and its mode is the host's to keep. udev(7) makes it 0666.
    Path("dev/net").mkdir()
    os.mknod("dev/net/tun", 0o20666, os.makedev(10, 200))
    Path("dev/net/tun").chmod(0o666)
    for name, kind, data in (
        ("pts", "devpts", "newinstance,ptmxmode=0666,mode=620,gid=5"),
        ("shm", "tmpfs", "mode=1777"),
    ):
        Path(f"dev/{name}").mkdir()
        mount(kind, f"dev/{name}", kind, MS_NOSUID, data)
    for name, target in (
        ("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"),
    ):  # fmt: skip
        Path(f"dev/{name}").symlink_to(target)


def mount_host_folder(store: str) -> None:
    """Make /run/host, for root only: the socket that hears READY=1, and a /proc in full view.

    Only where one procfs is mounted with nothing over it may a user namespace mount its own, as bubblewrap does
    (mount_too_revealing in fs/namespace.c).
    """
    Path("run/host/proc").mkdir(parents=True)
    Path("run/host").chmod(0o700)
    mount("proc", "run/host/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    Path("run/host/notify").touch()
    bind(f"{store}/notify", "run/host/notify")


def become_systemd(spec: dict[str, Any], store: str, shown: list[Hierarchy]) -> None:
    """Be PID 1 of the machine. Does not return."""
    try:
        check(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        for number in WITHHELD.values():
            check(LIBC.prctl(PR_CAPBSET_DROP, number, 0, 0, 0))
        os.dup2(2, 1)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        build_root(spec, store, shown)
        os.setsid()
        os.umask(0o022)
        environment = {
            "container": "cloister-test",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "NOTIFY_SOCKET": "/run/host/notify",
            "LANG": "C.UTF-8",
        }
        os.closerange(3, 64)
        os.execve("/lib/systemd/systemd", ["systemd", "--system", "--show-status=0"], environment)  # noqa: S606 (PID 1)
    except OSError as error:
        os.write(2, f"the machine cannot be built: {error}\n".encode())
    finally:
        os._exit(125)


# ---- the program ----


class Supervisor:
    """Boots, listens, boots again, and cleans up."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """Set up the part that outlives a boot."""
        self.spec, self.boots, self.pid, self.pidfd, self.cut = spec, 0, 0, -1, False
        self.every = hierarchies()
        remove_stale(self.every)
        check(LIBC.unshare(CLONE_NEWNS))
        mount("none", "/", flags=MS_REC | MS_PRIVATE)
        self.store = spec["scratch"]
        mount("tmpfs", self.store, "tmpfs", MS_NOSUID, "mode=755")
        for name in ("upper", "work", "merged", "own"):
            Path(self.store, name).mkdir(mode=0o755)
        base = spec["lower"][-1]
        for name in OWN:
            # Not shutil: owners, capabilities and special files are to be kept.
            check(-os.spawnlp(os.P_WAIT, "cp", "cp", "-a", f"{base}/{name}", f"{self.store}/own/{name}"))  # noqa: S606
        Path(self.store, "upper/etc").mkdir(mode=0o755)
        Path(self.store, "upper/etc/machine-id").write_text(f"{os.urandom(16).hex()}\n", encoding="utf-8")
        Path(self.store, "upper/etc/hostname").write_text(f"{spec['name']}\n", encoding="utf-8")
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(f"{self.store}/notify")
        self.cgroups: Cgroups | None = None

    def boot(self) -> None:
        """Start PID 1."""
        self.boots += 1
        self.cgroups = Cgroups(self.every, self.boots, hybrid=self.spec["hybrid"])
        flags = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
        with self.cgroups.inside():
            number = CLONE_NUMBER[platform.machine()]
            self.pid = check(LIBC.syscall(number, ctypes.c_ulong(flags | signal.SIGCHLD), None, None, None, None))
            if self.pid == 0:
                become_systemd(self.spec, self.store, self.cgroups.shown)
        self.pidfd = os.pidfd_open(self.pid)
        for file in self.cgroups.visitors:
            say(f"cgroup {file}")
        say(f"up {self.pid}")

    def watch(self) -> None:
        """Go on until standard input ends."""
        while True:
            watched = [0, self.notify.fileno(), *([self.pidfd] if self.pidfd >= 0 else [])]
            ready, _, _ = select.select(watched, [], [])
            if self.notify.fileno() in ready and b"READY=1" in self.notify.recv(4096).split(b"\n"):
                say(f"ready {self.pid}")
            if self.pidfd in ready:
                self.ended()
            if 0 in ready:
                words = os.read(0, 4096)
                if not words:
                    return
                if self.pidfd >= 0:
                    self.cut = True
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def ended(self) -> None:
        """PID 1 is gone, and with it all of its namespace: boot again if that was wanted."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.pidfd = -1
        if self.cgroups:
            self.cgroups.remove()
        again = self.cut or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGHUP)
        self.cut = False
        if again:
            self.boot()
        else:
            say(f"down {os.waitstatus_to_exitcode(status)}")

    def close(self) -> None:
        """End the machine."""
        if self.pidfd >= 0:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if self.cgroups:
            self.cgroups.remove()


def say(line: str) -> None:
    """Tell the other half."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{line}\n".encode())


def main() -> None:
    """Boot what the only argument describes."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C is pytest's: the lifeline says when it is over
    supervisor = Supervisor(json.loads(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        supervisor.boot()
        supervisor.watch()
    finally:
        supervisor.close()


if __name__ == "__main__":
    main()
