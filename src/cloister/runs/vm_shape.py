"""What templates and kept memory must be of: the machine of a run, without what differs between two runs. Pure."""

from __future__ import annotations

import hashlib

from cloister.isolation import firecracker, monitor_jail, qemu
from cloister.plan.bridge import NOBODYS_MAC
from cloister.plan.vm import FIRST_FILE, Accelerator, Role, VmLaunch
from cloister.plan.vm_template import Shape

_NEWEST = (9999, 0, 0)
ROLES: tuple[Role, ...] = ("kernel", "initramfs", "root", "var", "workspace", "memory", "state", "orders")
"""Of the descriptors of a machine that starts from a template, in order; those of any machine come first."""
LIVING = ("kernel", "initramfs", "root", "var", "workspace", "state", "orders")
"""Those of a machine that goes on from a snapshot's memory."""
COLD = 5
"""How many of them a machine has that boots."""


def numbers(count: int = len(ROLES)) -> dict[str, int]:
    """Return the descriptors' numbers, by role."""
    return {role: FIRST_FILE + index for index, role in enumerate(ROLES[:count])}


def warm_machine(  # noqa: PLR0913  # what decides a machine
    program: str, accelerator: Accelerator, cmdline: str, *, memory_mib: int, cpus: int, making: bool = False,
    qmp: str = "", disk_rate: int = 0, mac: str = "", tap_fd: int | None = None,
) -> qemu.Machine:  # fmt: skip
    """Return the machine that starts from a template, or the one that becomes one (`making`).

    What its disks may move in a second, whose its card is and where that leads are no part of a template.
    """
    named = numbers()
    return qemu.Machine(
        program=program,
        accelerator=accelerator,
        memory_mib=memory_mib,
        cpus=cpus,
        files={role: named[role] for role in ROLES[:COLD]},
        cmdline=cmdline,
        qmp=qmp,
        disk_rate=disk_rate,
        mac=mac,
        tap_fd=tap_fd,
        memory_fd=named["memory"],
        shared=making,
        orders_fd=named["orders"],
        incoming=not making,
    )


def living_machine(  # noqa: PLR0913  # what decides a machine
    program: str, accelerator: Accelerator, cmdline: str, *, memory_mib: int, cpus: int, named: bool,
    disk_rate: int = 0, qmp: str = "", mac: str = "", tap_fd: int | None = None,
) -> qemu.Machine:  # fmt: skip
    """Return the machine whose processes go on from a snapshot's memory.

    Args:
        program: path of the monitor.
        accelerator: that of the machine which was kept, as is all of what follows.
        cmdline: of the guest's kernel.
        memory_mib: its memory.
        cpus: its processors.
        named: it had started from a template.
        disk_rate: as the policy is now.
        qmp: path of the control socket.
        mac: of the run that goes on; its guest gives it to the card, which had another. Empty for no card.
        tap_fd: where the card leads.
    """
    named_files = {role: FIRST_FILE + index for index, role in enumerate(LIVING)}
    return qemu.Machine(
        program=program,
        accelerator=accelerator,
        memory_mib=memory_mib,
        cpus=cpus,
        files={role: named_files[role] for role in ROLES[:COLD]},
        cmdline=cmdline,
        disk_rate=disk_rate,
        qmp=qmp,
        mac=mac,
        tap_fd=tap_fd,
        named_memory=named,
        orders_fd=named_files["orders"],
        incoming=True,
    )


def shape_of(image: tuple[str, int, str], machine: qemu.Machine, *, program: str, host: str) -> Shape:
    """Return the shape of a machine of QEMU's.

    Args:
        image: its image's name, version, and manifest's digest.
        machine: as `warm_machine` returns it.
        program: the monitor's path with who it is now: its size and its times.
        host: words about the host's processor and kernel.
    """
    return Shape(
        image=image[0],
        version=image[1],
        manifest=image[2],
        program=program,
        accelerator=machine.accelerator,
        host=_digest(host),
        memory_mib=machine.memory_mib,
        cpus=machine.cpus,
        card=bool(machine.mac),
        machine=_digest(*qemu.qemu_argv(_standard(machine))),
    )


def asked_shape_of(vm: VmLaunch, *, program: str, host: str) -> Shape:
    """Return the shape of a machine of Firecracker's: all that a newest one would be asked for decides it.

    Args:
        vm: the machine, with the descriptors of `numbers`.
        program: as for `shape_of`.
        host: as well.
    """
    place, machine = firecracker.Place(directory=monitor_jail.VM), firecracker.Machine(cmdline=vm.cmdline)
    requests = firecracker.start_requests(vm, machine, place, _NEWEST)
    return Shape(
        image=vm.image,
        version=vm.version,
        manifest=vm.manifest,
        program=program,
        accelerator=vm.accelerator,
        host=_digest(host),
        memory_mib=vm.memory_mib,
        cpus=vm.cpus,
        machine=_digest(*(word for one in requests for word in (one.path, one.body.decode()))),
    )


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def _standard(machine: qemu.Machine) -> qemu.Machine:
    """Return the machine without what may differ between two runs, or says only how it is started."""
    return qemu.Machine(
        program=machine.program,
        accelerator=machine.accelerator,
        memory_mib=machine.memory_mib,
        cpus=machine.cpus,
        files=machine.files,
        cmdline=machine.cmdline,
        memory_fd=machine.memory_fd,
        mac=NOBODYS_MAC if machine.mac else "",
        named_memory=machine.named_memory,
    )
