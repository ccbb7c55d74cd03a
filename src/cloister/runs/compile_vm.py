"""From a policy and the facts of one start in a microVM to a plan. Pure.

The guest's file system is its image's; of this host it gets copies: the workspace on a disk of its own, and a tar with
what the policy carries in and what is generated. Programs are those of the image. What confines the agent in there is
the shim's inner half, as in a unit; around the monitor there is a jail (`isolation/monitor_jail.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import msgspec

from cloister.errors import UnsupportedError
from cloister.images.manifest import Manifest
from cloister.isolation import firecracker, inner, monitor_jail, qemu, seccomp
from cloister.isolation.namespace import SHIM
from cloister.plan.bridge import guest_mac
from cloister.plan.settings import form_of
from cloister.plan.steps import (
    AnyStep,
    Launch,
    MakeDirectory,
    MergeSettings,
    Plan,
    SeedFile,
    WriteBytes,
)
from cloister.plan.vm import (
    DIRECTORY,
    FIRST_FILE,
    VAR_DISK,
    WORKSPACE_DISK,
    Accelerator,
    Monitor,
    VmCarried,
    VmFile,
    VmLaunch,
    number_of,
)
from cloister.plan.vm_snapshot import MEMORY, STATE, Snapshot
from cloister.policy.model import Agent, Preset
from cloister.policy.units import parse_size
from cloister.runs import identity_files, limits
from cloister.runs.compile import PROJECT_RECORD, Facts, project_record
from cloister.runs.compile_parts import (
    Files,
    Said,
    box_steps,
    boxed_settings,
    command_argv,
    compose_environment,
    generated_files,
    is_nested,
    is_overlay,
    notices,
    opt_outs,
    plan_of,
    refuse_homeless_settings,
    seccomp_profile,
)
from cloister.runs.unenforced import refuse_unenforced_vm
from cloister.runs.vm_shape import living_machine, warm_machine

FILTER = "seccomp.bpf"
GUEST_UID = 1000
"""Of the agent in the guest, where root started the run: nobody is root in there but the guest's first process."""
_GUEST_RW = ("/workspace", "/tmp", "/var/tmp", "/dev", "/proc")  # noqa: S108  # the guest's own
_DISK_BYTES = 8 << 30
_MEMORY_BYTES = 1 << 30
_LEAST_MEMORY = 128 << 20
_MIB = 1 << 20
_OVERHEAD: dict[Accelerator, int] = {"tcg": 512 * _MIB, "kvm": 192 * _MIB}
"""What a monitor needs beside its guest's memory: TCG keeps the code that it translates."""
_MONITOR_TASKS = 512
"""QEMU has a thread for each processor and up to 64 for its disks."""


class VmFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What else a plan for a microVM depends on."""

    manifest: Manifest
    directory: str
    """Of the verified image."""
    monitor: Monitor
    program: str
    """Path of the monitor."""
    accelerator: Accelerator
    clock_khz: int = 0
    """Of the host's time stamp counter, for TCG: its guests cannot measure it on a busy host."""
    machine: str
    """As `uname -m` has it."""
    secrets: tuple[str, ...] = ()
    """Paths of this host that are left out of what is carried in."""
    template: tuple[str, str] | None = None
    """The directory of the template that the guest starts from, and the digest of its record; None boots it."""
    model: str = ""
    """The one model that the run may use, where its caller has narrowed that."""
    snapshot: str = ""
    """The snapshot whose disks it gets, by name."""
    kept: Snapshot | None = None
    """The record of that, where its processes go on from its memory, and where its files lie."""
    kept_in: str = ""
    notices: tuple[str, ...] = ()
    groups: tuple[int, ...] | None = None
    """Started by root: what its monitor needs beside a number of its own. None: it has its user's."""

    @property
    def cmdline(self) -> str:
        """The command line of the guest's kernel."""
        root = self.manifest.root
        table = f"{root.data_blocks}:{root.hash_start}:{root.root_hash}:{root.salt}"
        return qemu.command_line(self.manifest.cmdline, verity=table, clock_khz=self.clock_khz)


def compile_vm(  # noqa: PLR0913  # as `compile_run`, and the machine
    agent: Agent, preset: Preset, command: tuple[str, ...], egress: tuple[str, ...], facts: Facts, machine: VmFacts
) -> Plan:
    """Return the plan of one run in a microVM.

    Args:
        agent: what it may do, presets and profiles merged in, tightened.
        preset: what is known about the product.
        command: the argv to run; its program is looked for in the guest.
        egress: the rules in words, for the plan's reader and the note.
        facts: what was looked up, as for the namespace.
        machine: image, monitor and accelerator.

    Raises:
        UnsupportedError: the policy asks for what a microVM cannot have.
    """
    refuse_unenforced_vm(agent)
    refuse_homeless_settings(agent, preset)
    files = generated_files(agent, preset, facts, egress)
    if agent.settings:
        files.homed.append((preset.settings, boxed_settings(preset)))
    limited = _limited(agent, facts, machine)
    launch = _launch(agent, preset, command_argv(command, agent, preset, files, facts), files, facts, machine)
    launch = msgspec.structs.replace(launch, runtime_s=limited.runtime_s)
    said = Said(
        limits=tuple(_limit_words(agent, limited)),
        opt_outs=opt_outs(agent, facts, direct=False),
        notices=(*_notices(agent, facts), *machine.notices, *notices(agent, facts, direct=False)),
    )
    return plan_of(
        agent,
        facts,
        command,
        egress,
        (*_preparations(agent, preset, facts, files, launch, limited, machine), launch),
        said,
    )


def image_of(agent: Agent, preset: Preset) -> str:
    """Return the name of the image that an agent gets."""
    return agent.microvm.image or preset.image or "dev"


def memory_of(agent: Agent) -> int:
    """Return the guest's memory in bytes, in whole MiB.

    Raises:
        UnsupportedError: no guest starts with that little.
    """
    wanted = [parse_size(text) for text in (agent.microvm.memory, agent.limits.memory_max) if text]
    memory = min(wanted, default=_MEMORY_BYTES) // _MIB * _MIB
    if memory < _LEAST_MEMORY:
        raise UnsupportedError(
            "microvm-memory", f"a guest needs {_LEAST_MEMORY // _MIB} MiB of memory at least",
            where=".microvm.memory" if agent.microvm.memory else ".limits.memory_max", remedy='memory = "512M"',
        )  # fmt: skip
    return memory


def _limited(agent: Agent, facts: Facts, machine: VmFacts) -> limits.Limited:
    """Return what holds the monitor: the guest's memory and what the monitor needs, its processors' share.

    Nothing where the policy bounds nothing: a scope ends with its user's last session, and a detached guest with it.
    """
    asked = agent.limits
    bounded = bool(agent.microvm.memory or asked.memory_max or asked.cpu_quota)
    memory = ""
    if ("memory" in facts.limit_means.controllers and bounded) or asked.enforce == "cgroup":
        memory = f"{(memory_of(agent) + _OVERHEAD[machine.accelerator]) // _MIB}M"
    tasks = _MONITOR_TASKS if memory and "pids" in facts.limit_means.controllers else None
    outside = msgspec.structs.replace(asked, memory_max=memory, tasks_max=tasks, open_files=None, disk_max="")
    return limits.compile_limits(outside, means=facts.limit_means, run=facts.run, is_root=facts.uid == 0)


def _launch(  # noqa: PLR0913  # one place, six parts of one thing
    agent: Agent, preset: Preset, command: tuple[str, ...], files: Files, facts: Facts, machine: VmFacts
) -> Launch:
    literal, inherit = compose_environment(agent, preset, facts, facts.user)
    vm = _machine(agent, preset, files, facts, machine)
    return Launch(
        argv=monitor_jail.jail_argv(_jail(agent, facts, machine, vm)),
        command=command,
        directory=facts.directory,
        environment=literal,
        inherit=inherit,
        pty=facts.pty,
        seccomp=seccomp_profile(agent, listeners=bool(facts.notify)),
        vm=vm,
    )


def _machine(agent: Agent, preset: Preset, files: Files, facts: Facts, machine: VmFacts) -> VmLaunch:
    manifest, made = machine.manifest, preset.settings if agent.settings else ""
    return VmLaunch(
        image=manifest.name,
        version=manifest.version,
        manifest=manifest.digest(),
        monitor=machine.monitor,
        accelerator=machine.accelerator,
        memory_mib=memory_of(agent) // _MIB,
        cpus=agent.microvm.cpus or 1,
        files=_files(facts, machine),
        fields=tuple(_fields(agent, preset, facts)),
        inner=inner.inner_argv(SHIM, _inner(agent, preset, facts)),
        directory=f"{facts.run_runtime}/{DIRECTORY}",
        monitor_uid=0 if machine.groups is None else number_of(facts.run),
        disk_bytes=_disk(agent),
        disk_rate=parse_size(agent.microvm.disk_rate) if agent.microvm.disk_rate else 0,
        carried=tuple(
            VmCarried(path.name, path.source, _kind(path.kind)) for path in facts.carried if path.name != made
        ),
        secrets=tuple(dict.fromkeys([*machine.secrets, *(path for path, _ in facts.hide)])),
        homed=tuple(files.homed),
        seeds=tuple(preset.seed.items()),
        ports=agent.microvm.ports,
        network=agent.microvm.network,
        program=machine.program,
        cmdline=machine.cmdline,
        model=machine.model,
        snapshot=machine.snapshot,
        resumes=machine.kept.digest() if machine.kept else "",
        template=machine.template[1] if machine.template else "",
    )


def _kind(kind: str) -> Literal["file", "directory"]:
    return "directory" if kind == "directory" else "file"


def _files(facts: Facts, machine: VmFacts) -> tuple[VmFile, ...]:
    manifest, image = machine.manifest, machine.directory
    return (
        VmFile(role="kernel", path=f"{image}/vmlinux", digest=manifest.kernel.sha256),
        VmFile(role="initramfs", path=f"{image}/initramfs.cpio", digest=manifest.initramfs.sha256),
        VmFile(role="root", path=f"{image}/root.img"),
        VmFile(role="var", path=f"{facts.state}/{VAR_DISK}", write=True),
        VmFile(role="workspace", path=f"{facts.run_state}/{DIRECTORY}/{WORKSPACE_DISK}", write=True),
        *_template_files(machine),
    )


def _template_files(machine: VmFacts) -> tuple[VmFile, ...]:
    orders = VmFile(role="orders", path="")
    if machine.kept and machine.monitor == "qemu":
        return (VmFile(role="state", path=f"{machine.kept_in}/{MEMORY}"), orders)
    directory = machine.kept_in if machine.kept else machine.template[0] if machine.template else ""
    files: tuple[VmFile, ...] = ()
    if directory:
        files = (VmFile(role="memory", path=f"{directory}/{MEMORY}"), VmFile(role="state", path=f"{directory}/{STATE}"))
    if machine.monitor == "qemu":
        return (*files, orders) if files else ()
    # Firecracker is told by its API, and can be handed nothing more when it is to write its guest down.
    out = (VmFile(role="memory-out", path="", write=True), VmFile(role="state-out", path="", write=True))
    return (*files, *out)


def _fields(agent: Agent, preset: Preset, facts: Facts) -> Iterator[str]:
    """Yield what the guest is told at its beginning."""
    guest = guest_ids(facts)
    yield f"hostname={facts.hostname}"
    yield f"machine_id={hashlib.sha256(f'machine:{facts.run}'.encode()).hexdigest()[:32]}"
    yield f"user={facts.user}"
    yield f"uid={guest[0]}"
    yield f"gid={guest[1]}"
    yield f"home={facts.home}"
    yield f"workspace={facts.layout.root}"
    for name in preset.state:
        yield f"state={name}"
    for name in preset.seed:
        yield f"seed={facts.home}/{name}"
    for name in sockets_of(facts):
        yield f"socket={name}"
    if is_nested(agent):
        yield "nested=1"
    yield f"tmpfs={parse_size(agent.limits.disk_max) if agent.limits.disk_max else memory_of(agent) // 2}"


def guest_ids(facts: Facts) -> tuple[int, int]:
    """Return uid and gid of the agent in the guest."""
    return (facts.uid or GUEST_UID), (facts.gid or GUEST_UID)


def sockets_of(facts: Facts) -> tuple[str, ...]:
    """Return the names of the box's sockets."""
    return ("egress.sock", *(agent.socket for agent in facts.signing.agents))


def _inner(agent: Agent, preset: Preset, facts: Facts) -> inner.Inner:
    asked = agent.limits
    rlimits = {"core": 0, "nofile": asked.open_files, "nproc": asked.tasks_max}
    return inner.Inner(
        control=0,
        unit=True,
        seccomp=f"{inner.BOX}/{FILTER}",
        models=bool(facts.protocols),
        nested=is_nested(agent),
        landlock=agent.hardening.landlock,
        notify=facts.notify,
        landlock_rw=tuple(dict.fromkeys([facts.layout.root, facts.home, *_GUEST_RW])),
        mdwe=not (agent.hardening.write_execute and preset.write_execute),
        rlimits=tuple((name, value) for name, value in rlimits.items() if value is not None),
        probe_write=("/usr",),
        probe_connect=(inner.PROBE_ADDRESS,),
    )


def _jail(agent: Agent, facts: Facts, machine: VmFacts, vm: VmLaunch) -> monitor_jail.Jail:
    behind = FIRST_FILE + len(vm.files) + (vm.network == "bridge")
    return monitor_jail.Jail(
        bubblewrap=facts.bubblewrap,
        shim=facts.shim,
        box_directory=f"{facts.run_runtime}/box",
        vm_directory=vm.directory,
        merged_usr=facts.merged_usr,
        extra_system=facts.extra_system,
        uid=facts.uid,
        gid=facts.gid,
        kvm=machine.accelerator == "kvm",
        sockets=sockets_of(facts),
        published=tuple((behind + index, port) for index, port in enumerate(agent.microvm.ports)),
        adopt=machine.kept.memory.commands if machine.kept and machine.kept.memory else None,
        vsock=f"{monitor_jail.VM}/{firecracker.CHANNEL_SOCKET}" if vm.monitor == "firecracker" else "",
        firecracker=machine.program if vm.monitor == "firecracker" else "",
        monitor=_monitor(machine, vm, facts.uid, facts.run),
        number=monitor_jail.Number(vm.monitor_uid, machine.groups) if machine.groups is not None else None,
    )


def _monitor(machine: VmFacts, vm: VmLaunch, uid: int, run: str) -> tuple[str, ...]:
    connected = vm.network == "bridge"
    mac = guest_mac(uid, run) if connected else ""
    tap_fd = FIRST_FILE + len(vm.files) if connected else None
    if vm.monitor == "firecracker":
        firecracker.check(vm, firecracker.Machine(cmdline=vm.cmdline))
        return firecracker.monitor_argv(monitor_jail.FIRECRACKER, firecracker.Place(directory=monitor_jail.VM), run)
    named: dict[str, int] = {file.role: FIRST_FILE + index for index, file in enumerate(vm.files)}
    qmp = f"{monitor_jail.VM}/qmp.sock"
    if machine.kept and machine.kept.memory:
        living = living_machine(
            vm.program, vm.accelerator, vm.cmdline, memory_mib=vm.memory_mib, cpus=vm.cpus,
            named=machine.kept.memory.named, disk_rate=vm.disk_rate, qmp=qmp, mac=mac, tap_fd=tap_fd,
        )  # fmt: skip
        return qemu.qemu_argv(living)
    if vm.template:
        warm = warm_machine(
            vm.program, vm.accelerator, vm.cmdline, memory_mib=vm.memory_mib, cpus=vm.cpus, qmp=qmp,
            disk_rate=vm.disk_rate, mac=mac, tap_fd=tap_fd,
        )  # fmt: skip
        return qemu.qemu_argv(warm)
    return qemu.qemu_argv(
        qemu.Machine(
            program=machine.program,
            accelerator=vm.accelerator,
            memory_mib=vm.memory_mib,
            cpus=vm.cpus,
            files=named,
            cmdline=vm.cmdline,
            disk_rate=vm.disk_rate,
            qmp=qmp,
            tap_fd=tap_fd,
            mac=mac,
        )
    )


def _preparations(  # noqa: PLR0913  # one place, seven parts of one thing
    agent: Agent, preset: Preset, facts: Facts, files: Files, launch: Launch, limited: limits.Limited, machine: VmFacts
) -> Iterator[AnyStep]:
    """Yield everything before the launch, in the order in which it must be there. The disks are made after it."""
    box, shared = f"{facts.run_runtime}/box", machine.groups is not None
    yield MakeDirectory(path=facts.run_runtime)  # nobody else gets past this one
    yield MakeDirectory(path=box, mode=0o755 if shared else 0o700)
    yield MakeDirectory(path=f"{facts.run_runtime}/{DIRECTORY}", mode=0o777 if shared else 0o700)
    yield MakeDirectory(path=f"{facts.run_state}/{DIRECTORY}", kept=True)
    yield MakeDirectory(path=facts.state, kept=True)
    yield SeedFile(root=facts.state, name=PROJECT_RECORD, text=project_record(facts))
    identity = identity_files.tokens_step(
        agent.identity, box, facts.user, facts.uid, mode=0o444 if shared else 0o400
    )  # fmt: skip
    if identity:
        yield MakeDirectory(path=identity.directory, mode=0o755 if shared else 0o700)
        yield identity
    words = launch.seccomp.split(",")
    filtered = seccomp.assemble(
        machine.machine,
        nested="nested" in words,
        ptrace="ptrace" in words,
        netlink="netlink" in words,
        listeners="listeners" in words,
    )
    yield WriteBytes(path=f"{box}/{FILTER}", data=filtered)
    yield from box_steps(facts, files, launch, shared=shared)
    if agent.settings:
        path, form = f"{box}/{boxed_settings(preset)}", form_of(preset.settings)
        yield MergeSettings(path=path, source=facts.settings, settings=agent.settings, form=form)
    if limited.cgroup:
        yield limited.cgroup


def _disk(agent: Agent) -> int:
    asked = [parse_size(text) for text in (agent.microvm.disk, agent.limits.disk_max) if text]
    return min(asked, default=_DISK_BYTES)


def _limit_words(agent: Agent, limited: limits.Limited) -> Iterator[str]:
    """Say of each limit what keeps it."""
    asked, memory = agent.limits, memory_of(agent) // _MIB
    yield "core dumps: off (rlimit)"
    yield f"memory {memory} MiB: the guest's"
    held = limited.cgroup
    if held and held.memory_bytes:
        tasks = f", {held.tasks} tasks" if held.tasks else ""
        yield f"monitor {held.memory_bytes // _MIB} MiB{tasks}: {limits.mechanism(held)}"
    yield f"processors {agent.microvm.cpus or 1}: the guest's"
    if asked.tasks_max is not None:
        yield f"tasks_max {asked.tasks_max}: rlimit in the guest, where nobody else has that uid (RLIMIT_NPROC)"
    if asked.cpu_quota:
        yield f"cpu_quota {asked.cpu_quota}: {limits.mechanism(held)}, of the monitor"
    if asked.open_files is not None:
        yield f"open_files {asked.open_files}: rlimit"
    yield f"disk {_disk(agent) // _MIB} MiB: size of the guest's disk, and of what is added in the workspace"
    if agent.microvm.disk_rate:
        yield f"disk_rate {agent.microvm.disk_rate} a second: of each disk, kept by the monitor"
    if asked.runtime_max:
        yield f"runtime_max {asked.runtime_max}: broker, exit code 124"


def _notices(agent: Agent, facts: Facts) -> Iterator[str]:
    if not is_overlay(agent):
        yield (
            "the agent works in a copy of the workspace: at its end changes are written to the directory itself when "
            "nothing there has changed meanwhile and nothing protected is concerned, else kept for `cloister diff`"
        )
    outside = [
        mount.target for mount in facts.layout.mounts if not f"{mount.target}/".startswith(f"{facts.layout.root}/")
    ]
    if outside:
        yield f"git does not work in this workspace: {outside[0]} lies outside of it, and no guest sees it"
