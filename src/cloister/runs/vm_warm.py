"""Warm starts: which template a run could start from, and making one where there is none.

A template is made by booting the run's own image, in a jail, to where a guest waits for its orders. Nothing of any run
is in it: no name, no file, no secret, no entropy.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

from cloister.errors import CloisterError
from cloister.host import vm_template, vm_template_make
from cloister.isolation import qemu
from cloister.plan.bridge import NOBODYS_MAC
from cloister.plan.facts import HostFacts
from cloister.plan.vm import Accelerator, Monitor, VmFile, VmLaunch
from cloister.plan.vm_template import Shape, Template
from cloister.runs.vm_makers import Place, maker_of
from cloister.runs.vm_shape import COLD, ROLES, asked_shape_of, shape_of, warm_machine

NICE = ("/usr/bin/nice", "-n", "19")
_CPUINFO = "/proc/cpuinfo"
_ENOUGH = 16 << 10
_KEPT = ("vendor_id", "model name", "stepping", "microcode", "flags")


class Wanted(NamedTuple):
    """A machine that could start from a template."""

    image: str
    version: int
    manifest: str
    """Digest of the image's manifest."""
    monitor: Monitor
    program: str
    accelerator: Accelerator
    cmdline: str
    memory_mib: int
    cpus: int
    card: bool = False
    """With a network card, for the bridge."""

    def machine(self, *, making: bool = False) -> qemu.Machine:
        """Return it as QEMU's."""
        return warm_machine(
            self.program, self.accelerator, self.cmdline,
            memory_mib=self.memory_mib, cpus=self.cpus, making=making, mac=NOBODYS_MAC if self.card else "",
        )  # fmt: skip

    def launch(self) -> VmLaunch:
        """Return it as a plan's that starts from a template: Firecracker's requests are made from that."""
        roles = (*ROLES[:COLD], "memory", "state")
        return VmLaunch(
            image=self.image, version=self.version, manifest=self.manifest, monitor=self.monitor,
            accelerator=self.accelerator, memory_mib=self.memory_mib, cpus=self.cpus, fields=(), inner=(),
            files=tuple(VmFile(role=role, path="", write=role in {"var", "workspace"}) for role in roles),
            directory="", disk_bytes=0, program=self.program, cmdline=self.cmdline,
        )  # fmt: skip

    def shape(self) -> Shape:
        """Return what a template must have been made for.

        Raises:
            OSError: the monitor is not there.
        """
        program = program_words(self.program)
        if self.monitor == "firecracker":
            return asked_shape_of(self.launch(), program=program, host=host_words())
        return shape_of((self.image, self.version, self.manifest), self.machine(), program=program, host=host_words())


def wanted_of(vm: VmLaunch) -> Wanted:
    """Return the machine of a plan, as it could start from a template."""
    return Wanted(
        vm.image, vm.version, vm.manifest, vm.monitor, vm.program, vm.accelerator, vm.cmdline, vm.memory_mib, vm.cpus,
        vm.network == "bridge",
    )  # fmt: skip


class Found(NamedTuple):
    """A template that a plan can name."""

    directory: str
    digest: str


def place_of(host: HostFacts) -> Place:
    """Return the parts of a maker's jail on this host."""
    extra = tuple(path for path in ("/nix/store", "/gnu/store") if os.path.isdir(path))
    return Place(host.bwrap.path, host.root_links.get("bin") == "usr/bin", extra)


def find(root: str, wanted: Wanted) -> Found | None:
    """Return the template that a run can start from, if there is one. Cheap: nothing is hashed yet."""
    with contextlib.suppress(OSError):
        shape = wanted.shape()
        template = vm_template.find(root, shape)
        if template:
            return Found(f"{root}/{shape.key()}", template.digest())
    return None


def make(
    root: str, wanted: Wanted, place: Place, opened: Callable[[], dict[str, int]], *, quietly: bool = False
) -> Template:
    """Make the template of a machine, or return what is there. Takes as long as a boot, and a second.

    Args:
        root: the directory of templates.
        wanted: what it is for.
        place: the jail's parts.
        opened: returns verified descriptors of kernel, initramfs and root, by role; they are closed here.
        quietly: leave the processors to others.

    Raises:
        CloisterError: the image is not what was signed, the guest does not come up, or somebody else is making it.
    """
    shape = wanted.shape()
    there = vm_template.find(root, shape)
    if there:
        return there
    before = NICE if quietly and os.access(NICE[0], os.X_OK) else ()
    files = opened()
    try:
        maker = maker_of(wanted, place, files, vm_template_make.making_directory(root, shape), before)
        return vm_template_make.make(root, shape, maker)
    finally:
        for descriptor in files.values():
            os.close(descriptor)


class Background:
    """Makes templates beside a broker's work, one at a time; what goes wrong is told, and nobody waits for it."""

    def __init__(self, told: Callable[[str], None]) -> None:
        """Make nothing yet; `told` gets one line for each that could not be made."""
        self._told = told
        self._busy = threading.Lock()
        self._failed: set[str] = set()

    def begin(self, key: str, job: Callable[[], object]) -> None:
        """Do a job unless one is under way, or this one has failed before; returns at once.

        A thread that does not keep its process alive: when the broker ends, the maker's monitor ends with it.
        """
        if key in self._failed or not self._busy.acquire(blocking=False):
            return
        threading.Thread(target=self._work, args=(key, job), name="template", daemon=True).start()

    def _work(self, key: str, job: Callable[[], object]) -> None:
        try:
            job()
        except (CloisterError, OSError) as error:
            self._failed.add(key)
            self._told(error.message if isinstance(error, CloisterError) else str(error))
        finally:
            self._busy.release()


def program_words(path: str) -> str:
    """Return who a monitor is: its path, its size and its times.

    Raises:
        OSError: it is not there.
    """
    info = os.stat(path)
    return f"{path} {info.st_ino} {info.st_size} {info.st_mtime_ns}"


@functools.cache
def host_words() -> str:
    """Return what a guest finds out about the host and believes for ever: its processor; and our kernel."""
    with open(_CPUINFO, encoding="ascii", errors="replace") as file:
        first = file.read(_ENOUGH).partition("\n\n")[0]
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip() in _KEPT]
    release = os.uname()
    return "\n".join([release.machine, release.release, *lines])
