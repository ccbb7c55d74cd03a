"""Preparing a run in a microVM: its image, what can run it here, its plan."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

import msgspec

from cloister.errors import PolicyError, Problem, UnsupportedError
from cloister.host.monitor_number import check_reachable, groups_for, has_numbers
from cloister.host.vm_link import PROTOCOL
from cloister.isolation.qemu import clock_khz
from cloister.plan.steps import Plan
from cloister.plan.vm import Accelerator
from cloister.policy.merge import ResolvedAgent
from cloister.policy.model import Agent
from cloister.runs import vm_monitor, vm_warm
from cloister.runs.client import SHIM
from cloister.runs.compile import Facts
from cloister.runs.compile_vm import VmFacts, compile_vm, image_of, memory_of
from cloister.runs.credentials_places import host_path
from cloister.runs.home_files import HomeFiles
from cloister.runs.unenforced import refuse_unenforced_vm
from cloister.runs.vm_accelerator import Guest, Trying, quietly
from cloister.runs.vm_accelerator import accelerator as accelerated
from cloister.runs.vm_image import find

if TYPE_CHECKING:
    from cloister.egress.rules import Ruleset
    from cloister.plan.vm_snapshot import Snapshot
    from cloister.runs.prepare import Kitchen
    from cloister.runs.request import RunRequest

QEMU = ("/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm", "/run/current-system/sw/bin/qemu-system-x86_64")
_FILE = "file:"


def compile_plan(  # noqa: PLR0913  # what `prepare` has at hand
    kitchen: Kitchen, agent: Agent, resolved: ResolvedAgent, command: tuple[str, ...], ruleset: Ruleset, facts: Facts,
    found: HomeFiles, request: RunRequest, kept: Snapshot | None = None, machine: VmFacts | None = None,
) -> Plan:  # fmt: skip
    """Return the plan of a run in a microVM; without `machine` it is looked for, which may boot a guest.

    Raises:
        CloisterError: the image is not there or not trusted, no monitor runs here, or the policy asks for too much.
    """
    machine = machine or machine_facts(kitchen, agent, resolved, facts.layout.root)
    machine = msgspec.structs.replace(machine, secrets=found.secrets, model=request.model, snapshot=request.snapshot)
    if kept:
        place = f"{kitchen.paths.snapshots}/{kept.name}"
        machine = msgspec.structs.replace(machine, kept=kept, kept_in=place)
    else:
        machine = msgspec.structs.replace(machine, template=template_of(kitchen.paths.templates, agent, machine))
    plan = compile_vm(agent, resolved.preset, command, tuple(ruleset.allow.describe()), facts, machine)
    refuse_visible(plan, kitchen.paths.home)
    if kept:
        from cloister.runs.vm_snapshots import refuse_other

        refuse_other(kept, plan, agent)
    return plan


def machine_facts(
    kitchen: Kitchen, agent: Agent, resolved: ResolvedAgent, workspace: str = "", trying: Trying = quietly
) -> VmFacts:
    """Look for the image, a monitor and an accelerator. Where no answer is kept it takes its time: it boots a guest.

    Args:
        kitchen: whose images these are.
        agent: what is asked for.
        resolved: the same with its preset and policy.
        workspace: where no monitor may come from.
        trying: told before a boot what is tried; what it raises is passed on.

    Raises:
        CloisterError: one of them is not there, or not to be trusted.
    """
    refuse_unenforced_vm(agent)  # what no image and no host would change comes first
    refuse_larger(memory_of(agent), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    name, images = image_of(agent, resolved.preset), resolved.policy.images
    image = find(kitchen.paths, images, name, kitchen.owner.uid)
    if image.manifest.protocol != PROTOCOL:
        raise UnsupportedError(
            "image-protocol", f"the image speaks version {image.manifest.protocol} of the channel, and not {PROTOCOL}",
            where=image.directory, remedy=f"cloister image renew {name}",
        )  # fmt: skip
    guest = Guest(f"{image.directory}/vmlinux", f"{image.directory}/initramfs.cpio", image.manifest.digest())
    runtime = kitchen.paths.runtime
    choice = vm_monitor.choose(
        vm_monitor.Wanted(agent.microvm.monitor, agent.microvm.network),
        kvm=lambda: not installed_qemu() or accelerated(find_qemu(), guest, runtime, trying).accelerator == "kvm",
        program=vm_monitor.find(os.environ.get("PATH", ""), owner=os.geteuid(), forbidden=(workspace,)),
        attempt=lambda program: vm_monitor.attempt(program, image.directory, runtime, trying),
    )
    accelerator: Accelerator = "kvm"  # Firecracker has no other
    if choice.monitor == "qemu":
        accelerator = accelerated(find_qemu(), guest, runtime, trying).accelerator
    program = choice.program or find_qemu()
    return VmFacts(
        manifest=image.manifest,
        directory=image.directory,
        monitor=choice.monitor,
        program=program,
        accelerator=accelerator,
        groups=_groups(accelerator, SHIM, program) if has_numbers() else None,
        clock_khz=host_clock_khz() if accelerator == "tcg" else 0,
        machine=platform.machine(),
    )


def _groups(accelerator: Accelerator, *programs: str) -> tuple[int, ...]:
    """Return what the monitor of a run of root's needs beside a number of its own.

    Raises:
        UnsupportedError: nobody but root can use what it needs.
    """
    check_reachable(*programs)
    return groups_for() if accelerator == "kvm" else ()


def refuse_larger(wanted: int, memory: int) -> None:
    """Refuse a guest with more memory than the host has, in bytes.

    Raises:
        UnsupportedError: `microvm-memory`.
    """
    if wanted > memory:
        raise UnsupportedError(
            "microvm-memory", f"the guest shall have {wanted >> 20} MiB of memory, and this host has {memory >> 20}",
            where=".microvm.memory", remedy=f'memory = "{max(memory >> 21, 128)}M"',
        )  # fmt: skip


def template_of(root: str, agent: Agent, machine: VmFacts) -> tuple[str, str] | None:
    """Return the template that the guest can start from, if there is one."""
    wanted = template_wanted(agent, machine)
    return vm_warm.find(root, wanted) if wanted else None


def template_wanted(agent: Agent, machine: VmFacts) -> vm_warm.Wanted | None:
    """Return what a template would have to be; None for a guest that boots each time."""
    if not agent.microvm.warm:
        return None
    manifest = machine.manifest
    return vm_warm.Wanted(
        manifest.name, manifest.version, manifest.digest(), machine.monitor, machine.program, machine.accelerator,
        machine.cmdline, memory_of(agent) >> 20, agent.microvm.cpus or 1, agent.microvm.network == "bridge",
    )  # fmt: skip


def installed_qemu() -> str:
    """Return the path of QEMU, or nothing."""
    return next((path for path in QEMU if os.access(path, os.X_OK)), "")


def find_qemu() -> str:
    """Return the path of QEMU.

    Raises:
        UnsupportedError: there is none.
    """
    if path := installed_qemu():
        return path
    raise UnsupportedError(
        "qemu-missing", 'isolation = "microvm" needs QEMU, and there is none',
        where=".isolation", remedy="sudo apt install qemu-system-x86",
    )  # fmt: skip


def host_clock_khz() -> int:
    """Return the rate of the host's time stamp counter, which is that of a guest under TCG."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        return clock_khz(file.read())


def refuse_visible(plan: Plan, home: str) -> None:
    """Refuse a plan whose guest would get a copy of one of its own secrets.

    Raises:
        PolicyError: `secret-visible`, with the credential and the place.
    """
    vm = plan.launch.vm
    copied = [plan.workspace, *(one.source for one in vm.carried)] if vm else []
    for credential in plan.credentials:
        if not credential.secret.startswith(_FILE):
            continue
        path = os.path.realpath(host_path(credential.secret, home))
        if any(f"{path}/".startswith(f"{os.path.realpath(place).rstrip('/')}/") for place in copied):
            where = f".agents.{plan.agent}.credentials.{credential.name}.secret"
            message = f"the agent could read the secret itself, at {path}"
            remedy = "move the file, such as to ~/.config/cloister"
            raise PolicyError([Problem(message, where, remedy)], reference="secret-visible")
