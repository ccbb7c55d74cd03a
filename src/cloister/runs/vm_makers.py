"""How a template's monitors are started, QEMU or Firecracker: their machines, their jail, what they are asked for."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, NamedTuple

from cloister.host import vm_template_firecracker, vm_template_qemu
from cloister.host.memory_file import memory_file
from cloister.isolation import firecracker, monitor_jail, qemu, seccomp
from cloister.isolation.firecracker_api import Request, parse_version
from cloister.isolation.namespace import SECCOMP_FD
from cloister.isolation.template_jail import template_argv
from cloister.runs.vm_shape import numbers

if TYPE_CHECKING:
    from cloister.host.vm_template_make import Maker
    from cloister.runs.vm_warm import Wanted

_INSTANCE = "template"


class Place(NamedTuple):
    """What the jail around a maker's monitor is made of."""

    bubblewrap: str
    merged_usr: bool
    extra_system: tuple[str, ...]


def maker_of(
    wanted: Wanted, place: Place, files: dict[str, int], directory: str, before: tuple[str, ...] = ()
) -> Maker:
    """Return what makes a template.

    Args:
        wanted: what it is for.
        place: the jail's parts.
        files: open kernel, initramfs and root, by role; the filters of the jails are added, the caller's as well.
        directory: where it is made.
        before: words before the jail's argv.
    """
    for key in ("filter", "twin's filter"):  # each monitor reads it from its beginning
        filtered = seccomp.assemble(platform.machine(), nested=False, ptrace=False, netlink=False)
        files[key] = memory_file("filter", filtered)
    make = _firecracker if wanted.monitor == "firecracker" else _qemu
    return make(wanted, place, files, directory, before)


def _qemu(wanted: Wanted, place: Place, files: dict[str, int], directory: str, before: tuple[str, ...]) -> Maker:
    del directory
    named, machines = numbers(), []
    for making in (True, False):
        jail = template_argv(
            place.bubblewrap, qemu.qemu_argv(wanted.machine(making=making)),
            merged_usr=place.merged_usr, extra_system=place.extra_system, kvm=wanted.accelerator == "kvm",
            uid=os.geteuid(),
        )  # fmt: skip
        machines.append(
            vm_template_qemu.Machine(
                argv=(*before, *jail),
                files=_given(files, making=making),
                disks=(named["var"], named["workspace"]),
                memory=named["memory"],
                orders=named["orders"],
                state=0 if making else named["state"],
            )
        )
    return vm_template_qemu.Qemu(*machines)


def _firecracker(wanted: Wanted, place: Place, files: dict[str, int], directory: str, before: tuple[str, ...]) -> Maker:
    """Firecracker's: `/proc/self/fd/N` are the placeholders here, and in a run its own disks."""
    named, inside = numbers(), firecracker.Place(directory=monitor_jail.VM)
    launch, machine = wanted.launch(), firecracker.Machine(cmdline=wanted.cmdline)
    state, memory = (f"/proc/self/fd/{named[role]}" for role in ("state", "memory"))

    def goes_on(version: str) -> tuple[Request, ...]:
        return firecracker.warm_requests(launch, machine, inside, parse_version(version))

    def boots(version: str) -> tuple[Request, ...]:
        goes_on(version)  # refuses, before anything boots, a version that restores nothing
        return firecracker.start_requests(launch, machine, inside, parse_version(version))

    jail = template_argv(
        place.bubblewrap, firecracker.monitor_argv(monitor_jail.FIRECRACKER, inside, _INSTANCE),
        merged_usr=place.merged_usr, extra_system=place.extra_system, kvm=True, uid=os.geteuid(),
        firecracker=wanted.program,
        directory=f"{directory}/{vm_template_firecracker.DIRECTORY}",
    )  # fmt: skip
    hold = (firecracker.set_state("Paused"), firecracker.create_snapshot(state, memory))
    machines = (
        vm_template_firecracker.Machine(
            argv=(*before, *jail),
            files=_given(files, making=making),
            disks=(named["var"], named["workspace"]),
            memory=named["memory"],
            state=named["state"],
            begin=boots if making else goes_on,
            hold=hold if making else (),
        )
        for making in (True, False)
    )
    return vm_template_firecracker.Firecracker(
        *machines, api=firecracker.API_SOCKET, channel=firecracker.CHANNEL_SOCKET, port=firecracker.PORT
    )


def _given(files: dict[str, int], *, making: bool) -> dict[int, int]:
    """Return the descriptors of a monitor, by number."""
    named = numbers()
    own = {named[role]: files[role] for role in files if role in named}
    return {SECCOMP_FD: files["filter" if making else "twin's filter"]} | own
