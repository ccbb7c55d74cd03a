"""How a template's monitors are started, QEMU or Firecracker: their machines, their jail, what they are asked for."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, NamedTuple

from cloister.host import vm_template_firecracker, vm_template_qemu
from cloister.host.memory_file import memory_file
from cloister.host.monitor_number import groups_for, hand_over, has_numbers
from cloister.isolation import firecracker, monitor_jail, qemu, seccomp
from cloister.isolation.firecracker_api import Request, parse_version
from cloister.isolation.namespace import SECCOMP_FD
from cloister.isolation.template_jail import template_argv
from cloister.plan.vm import number_of
from cloister.runs.client import SHIM
from cloister.runs.vm_shape import COLD, ROLES, numbers

if TYPE_CHECKING:
    from cloister.host.vm_template_make import Maker
    from cloister.runs.vm_warm import Wanted

_INSTANCE = "template"


class Place(NamedTuple):
    """What the jail around a maker's monitor is made of."""

    bubblewrap: str
    merged_usr: bool
    extra_system: tuple[str, ...]
    number: monitor_jail.Number | None = None
    """Of the monitor, where root makes the template."""


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
    number = _number(os.path.basename(directory), kvm=wanted.accelerator == "kvm")
    if wanted.monitor == "firecracker":
        return _firecracker(wanted, place._replace(number=number), files, directory, before)
    return _qemu(wanted, place._replace(number=number), files, before)


def _number(name: str, *, kvm: bool) -> monitor_jail.Number | None:
    """Return under which number a maker's monitor runs; None: ours."""
    return monitor_jail.Number(number_of(name), groups_for() if kvm else ()) if has_numbers() else None


def _qemu(wanted: Wanted, place: Place, files: dict[str, int], before: tuple[str, ...]) -> Maker:
    named, machines = numbers(), []
    for making in (True, False):
        jail = template_argv(
            place.bubblewrap, qemu.qemu_argv(wanted.machine(making=making)),
            merged_usr=place.merged_usr, extra_system=place.extra_system, kvm=wanted.accelerator == "kvm",
            uid=os.geteuid(), number=place.number, shim=SHIM,
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
        number=place.number, shim=SHIM, firecracker=wanted.program,
        directory=f"{directory}/{vm_template_firecracker.DIRECTORY}",
    )  # fmt: skip
    if place.number:
        for role in ROLES[:COLD]:
            if role in files:
                hand_over(files[role], place.number.uid, write=False)
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
            number=place.number.uid if place.number else 0,
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
