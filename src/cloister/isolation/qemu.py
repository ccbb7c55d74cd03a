"""QEMU's argv for a guest: the `microvm` machine, disks and channels by descriptor, and nothing that was not asked for.

Options are those of qemu-system-x86_64(1), version 7.2 or newer. Pure.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cloister.plan.vm import CHANNEL_FD, CONSOLE_FD, Accelerator

_DISKS = ("root", "var", "workspace")
"""In the order of the guest's vda, vdb, vdc."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What decides QEMU's argv."""

    program: str
    accelerator: Accelerator
    memory_mib: int
    cpus: int
    files: dict[str, int]
    """Descriptors, by role."""
    cmdline: str
    qmp: str
    """Path of the control socket, as seen in the jail."""
    tap_fd: int | None = None
    mac: str = ""
    memory_file: str = ""
    incoming_fd: int | None = None


def command_line(template: str, *, verity: str, clock_khz: int) -> str:
    """Return the kernel's command line from the template of a manifest."""
    clock = f"tsc_early_khz={clock_khz}" if clock_khz else ""
    return " ".join(template.replace("{verity}", verity).replace("{clock}", clock).split())


def qemu_argv(machine: Machine) -> tuple[str, ...]:
    """Return the whole argv."""
    cpu: Literal["host", "max"] = "host" if machine.accelerator == "kvm" else "max"
    argv = [machine.program, "-accel", machine.accelerator, "-M", "microvm", "-cpu", cpu]
    argv += ["-m", f"{machine.memory_mib}M", "-smp", str(machine.cpus)]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-kernel", f"/proc/self/fd/{machine.files['kernel']}"]
    argv += ["-initrd", f"/proc/self/fd/{machine.files['initramfs']}", "-append", machine.cmdline]
    for index, role in enumerate(_DISKS):
        descriptor = machine.files[role]
        only = "on" if role == "root" else "off"
        argv += ["-add-fd", f"fd={descriptor},set={index}"]
        argv += [
            "-blockdev",
            f"driver=file,node-name={role}-file,filename=/dev/fdset/{index},locking=off,read-only={only},auto-read-only=off",
        ]
        argv += ["-blockdev", f"driver=raw,node-name={role},file={role}-file,read-only={only},auto-read-only=off"]
        argv += ["-device", f"virtio-blk-device,drive={role}"]
    argv += ["-chardev", f"socket,id=channel,fd={CHANNEL_FD}", "-device", "virtio-serial-device"]
    argv += ["-device", "virtserialport,chardev=channel,name=cloister"]
    argv += ["-add-fd", f"fd={CONSOLE_FD},set=9", "-serial", "file:/dev/fdset/9"]
    argv += ["-device", "virtio-rng-device", "-qmp", f"unix:{machine.qmp},server=on,wait=off"]
    if machine.tap_fd is not None:
        argv += [
            "-netdev",
            f"tap,id=net,fd={machine.tap_fd}",
            "-device",
            f"virtio-net-device,netdev=net,mac={machine.mac}",
        ]
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    return tuple(argv)
