"""Guests of the benchmarks: started as Cloister starts them, up to their first reply; a plain one to compare with.

The image is the tests' own (tools/guest-image). The plain guest is the same kernel with the same modules in QEMU,
without a jail, a verified root or a link; its init is `init.c`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.world import World

from cloister.host import vm_link, vm_template, vm_template_monitor
from cloister.images.initramfs import Entry, newc
from cloister.isolation import qemu
from cloister.isolation.template_jail import template_argv
from cloister.plan.vm import CHANNEL_FD, CONSOLE_FD
from cloister.policy.model import Images
from cloister.runs import vm_warm
from cloister.runs.images import Builder, ImagePlaces, open_for_run
from cloister.runs.vm_shape import numbers

AGENT = """\
[agents.{name}]
preset = "shell"
isolation = "microvm"
environment_audit = false
microvm.image = "test"
microvm.memory = "256M"
microvm.warm = {warm}

"""
MEMORY_MIB = 256
REPLY_S = 120.0
QEMU = "/usr/bin/qemu-system-x86_64"
PLACE = vm_warm.Place("/usr/bin/bwrap", merged_usr=True, extra_system=())


class Alive(NamedTuple):
    """A guest that has replied."""

    pid: int
    taken_s: float
    memory: int

    def end(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def proportional_mib(self) -> float:
        """Return its PSS, with all that it has started (the jail's monitor)."""
        total = 0
        for process in self.family():
            with contextlib.suppress(OSError), open(f"/proc/{process}/smaps_rollup", encoding="ascii") as file:
                total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        return total / 1024

    def family(self) -> list[int]:
        """Return the process and its descendants."""
        found = [self.pid]
        for process in found:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
                found += map(int, children.split())
        return found


class Guests:
    """The image of one made-up user, opened and verified, and its template."""

    def __init__(self, world: World, image: str) -> None:
        """Renew the image with the program under test; make the template."""
        self.where = ImagePlaces(
            store=str(world.home / ".local/share/cloister/images"), key=str(world.home / "key/image-key.pem"),
            trust=str(world.home / ".config/cloister/trust.d"), seen=str(world.home / "seen.json"),
            system_store=f"{image}/store", system_trust="/nonexistent",
        )  # fmt: skip
        trust = Path(self.where.trust)
        trust.mkdir(parents=True, mode=0o700)
        for each in Path(image, "trust.d").iterdir():
            (trust / each.name).write_bytes(each.read_bytes())
            (trust / each.name).chmod(0o600)
        self.manifest = Builder(self.where, lambda _: None).renew("test", Images(), os.getuid()).manifest
        (trust / "renewed.pub").write_bytes(Path(f"{self.where.key}.pub").read_bytes())
        (trust / "renewed.pub").chmod(0o600)
        with open_for_run(self.where, Images(), "test", uid=os.getuid()) as opened:
            self.files = dict(zip(("kernel", "initramfs", "root"), opened.take(), strict=True))
        root = self.manifest.root
        table = f"{root.data_blocks}:{root.hash_start}:{root.root_hash}:{root.salt}"
        self.clock = qemu.clock_khz(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        self.wanted = vm_warm.Wanted(
            "test", self.manifest.version, self.manifest.digest(), "qemu", QEMU, "tcg",
            qemu.command_line(self.manifest.cmdline, verity=table, clock_khz=self.clock), MEMORY_MIB, 1,
        )  # fmt: skip
        self.templates = str(world.home / "templates")
        self.template = vm_warm.make(self.templates, self.wanted, PLACE, self._copies)
        found = vm_warm.find(self.templates, self.wanted)
        assert found is not None
        began = time.perf_counter()
        self.held = vm_template.Holder().hold(found.directory, found.digest)
        self.verify_template_ms = (time.perf_counter() - began) * 1000
        self._plain = self._plain_initramfs(world.home)
        self._empty = os.memfd_create("disk")
        os.ftruncate(self._empty, 1 << 20)

    def plain(self) -> Alive:
        """Boot the same kernel in QEMU alone."""
        named = numbers()
        machine = qemu.Machine(
            program=QEMU, accelerator="tcg", memory_mib=MEMORY_MIB, cpus=1,
            files={"kernel": named["kernel"], "initramfs": named["initramfs"], "root": named["root"]},
            cmdline=qemu.command_line(self.manifest.cmdline, verity="none", clock_khz=self.clock),
        )  # fmt: skip
        files = {"kernel": self.files["kernel"], "initramfs": self._plain, "root": self.files["root"]}
        return self._start(qemu.qemu_argv(machine), {named[role]: file for role, file in files.items()})

    def cold(self) -> Alive:
        """Boot ours: in its jail, from its verified root."""
        named = numbers()
        machine = qemu.Machine(
            program=QEMU, accelerator="tcg", memory_mib=MEMORY_MIB, cpus=1, cmdline=self.wanted.cmdline,
            files={role: named[role] for role in ("kernel", "initramfs", "root", "var", "workspace")},
        )  # fmt: skip
        return self._start(self._jailed(machine), self._named())

    def warm(self) -> Alive:
        """Start ours from its template."""
        named = numbers()
        orders, peer = self.held.orders(named["state"])
        state = self.held.state()
        files = {named["memory"]: self.held.memory, named["state"]: state, named["orders"]: orders}
        try:
            return self._start(self._jailed(self.wanted.machine()), self._named() | files)
        finally:
            for descriptor in (orders, state):
                os.close(descriptor)
            _kept.append(peer)

    def _copies(self) -> dict[str, int]:
        return {role: os.dup(descriptor) for role, descriptor in self.files.items()}

    def _named(self) -> dict[int, int]:
        named = numbers()
        files = {named[role]: descriptor for role, descriptor in self.files.items()}
        return files | {named["var"]: self._empty, named["workspace"]: self._empty}

    def _jailed(self, machine: qemu.Machine) -> tuple[str, ...]:
        argv = template_argv(
            PLACE.bubblewrap, qemu.qemu_argv(machine), merged_usr=True, extra_system=(), kvm=False, uid=os.getuid()
        )
        at = argv.index("--seccomp")  # the filter costs nothing that could be measured, and needs no descriptor so
        return (*argv[:at], *argv[at + 2 :])

    def _start(self, argv: tuple[str, ...], files: dict[int, int]) -> Alive:
        channel, theirs = vm_link.pair()
        console, printed = os.pipe()
        nonce = vm_link.new_nonce()
        began = time.perf_counter()
        pid = vm_template_monitor.spawn(argv, files | {CHANNEL_FD: theirs, CONSOLE_FD: printed}, printed)
        os.close(theirs)
        os.close(printed)
        _kept.append(console)
        vm_link.greet(channel, nonce)
        vm_link.hello(channel, nonce, timeout_s=REPLY_S)
        taken = time.perf_counter() - began
        _channels.append(channel)
        return Alive(pid, taken, MEMORY_MIB)

    def _plain_initramfs(self, home: Path) -> int:
        """Return an initramfs with our modules and the plain init."""
        source = Path(__file__).with_name("init.c")
        subprocess.run(["cc", "-static", "-O2", "-o", str(home / "init"), str(source)], check=True)
        entries = [_renamed(entry, home / "init") for entry in _entries(self.files["initramfs"])]
        descriptor = os.memfd_create("initramfs")
        os.write(descriptor, newc(entries))
        return descriptor


_kept: list[int] = []
_channels: list[object] = []
"""Ends that stay open as long as their guests may live."""


def _entries(initramfs: int) -> Iterator[Entry]:
    """Yield the entries of an archive that `newc` wrote."""
    data = os.pread(initramfs, os.fstat(initramfs).st_size, 0)
    at = 0
    while data[at : at + 6] == b"070701":
        fields = [int(data[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 109 + length].decode()
        if name == "TRAILER!!!":
            return
        begin = (at + 110 + length + 3) // 4 * 4
        device = (fields[9], fields[10]) if stat.S_ISCHR(mode) else None
        yield Entry(name, stat.S_IMODE(mode), data[begin : begin + size] if stat.S_ISREG(mode) else None, device)
        at = (begin + size + 3) // 4 * 4


def _renamed(entry: Entry, init: Path) -> Entry:
    return entry._replace(data=init.read_bytes()) if entry.name == "init" else entry


def monitor_version() -> str:
    """Return QEMU's version."""
    told = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return told.split()[3]
