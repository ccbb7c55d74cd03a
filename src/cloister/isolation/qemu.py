"""QEMU's argv for a guest: the `microvm` machine, disks and channels by descriptor, and nothing that was not asked for.

Options are those of qemu-system-x86_64(1), version 7.2 or newer. What is not named does not exist in the machine: no
default devices, no user's configuration, no network card unless it has a MAC, no monitor but the run's own. QEMU's
seccomp filter denies what it needs only while it starts. Pure. What it is not: the jail around it
(`isolation/monitor_jail.py`).
"""

from __future__ import annotations

import msgspec

from cloister.plan.vm import CHANNEL_FD, CONSOLE_FD, Accelerator

PORT = "cloister"
"""Name of the virtio port that carries the link; PID 1 of the guest looks for it."""
TRANSLATIONS_MIB = 256
"""What TCG may keep of translated code, above the guest's memory. QEMU's own bound is an eighth of the host's."""
DISKS = ("root", "var", "workspace")
"""In the order of the guest's vda, vdb, vdc."""
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_CONSOLE_SET = 9
_KIND = "microvm,auto-kernel-cmdline=off"
"""The kernel gets our words and no others."""
_BARE = ("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot")
_PROBE_MIB = 128
_HOSTS = "host,vmx=off,svm=off"
"""A guest has no guests of its own: what emulates a processor's virtualization is a part of the host's kernel."""
_EMULATED = "max,cx16=off"
"""QEMU 7.2 spoils the flags of CMPXCHG16B now and then, of which Linux 6.12 dies in its memory allocator."""
_BALLOON = "virtio-balloon-device,deflate-on-oom=on,free-page-reporting=on,page-poison=off"
"""Free pages go back to the host, and come back with any content: a guest that wants them empty reports none.

Of memory that machines share the part that this one has written goes back: see `discards.py`."""
_ONLY_DATA = "discard=off,write-zeroes=off"
"""Disks are read and written. No request of theirs makes QEMU punch a hole: that call is for memory (`discards.py`)."""
_NO_FEATURES = (
    "csum", "guest_csum", "gso", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo", "host_tso4", "host_tso6",
    "host_ecn", "host_ufo", "mrg_rxbuf", "status", "guest_announce", "ctrl_vq", "ctrl_rx", "ctrl_rx_extra",
    "ctrl_vlan", "ctrl_mac_addr", "ctrl_guest_offloads",
)  # fmt: skip
"""Of virtio-net, by the names of QEMU 7.2. Newer ones are for taps with a virtio header, which ours are not."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What decides QEMU's argv. Descriptors are those that the monitor inherits."""

    program: str
    accelerator: Accelerator
    memory_mib: int
    cpus: int
    files: dict[str, int]
    """Descriptors by role: kernel and initramfs always; of the disks those that there are."""
    cmdline: str
    qmp: str = ""
    """Path of the control socket, as seen in the jail; empty for none."""
    disk_rate: int = 0
    """Bytes that each disk may move in a second; 0: as many as it can."""
    mac: str = ""
    """Of its card; empty for a machine without one."""
    tap_fd: int | None = None
    """Where the card leads; None where it leads nowhere: in a machine that becomes a template."""
    memory_fd: int | None = None
    """A file that is the guest's memory: of a template while it is made, and of what starts from it."""
    named_memory: bool = False
    """Its memory has the name that those of templates have, and is no file: it comes with the state."""
    shared: bool = False
    """Writes go into `memory_fd`: a template is being made. Else they stay in the process."""
    orders_fd: int | None = None
    """A socket with QMP commands already in it, for a machine that takes up a snapshot."""
    incoming: bool = False
    """Do not boot: wait for the state that the orders bring."""


def command_line(template: str, *, verity: str, clock_khz: int) -> str:
    """Return the kernel's command line from the template of a manifest; no clock (0) leaves its words out.

    A kernel that holds the counter against its own timer's ticks (kernel/time/clocksource.c) gives it up on a busy
    host, where ticks are late: then its clock has steps of 4 ms and falls behind, by seconds in a minute. The counter
    is right: emulation reads the host's, and never lets it go back.
    """
    clock = f"tsc_early_khz={clock_khz} tsc=reliable" if clock_khz else ""
    return " ".join(template.replace("{verity}", verity).replace("{clock}", clock).split())


def clock_khz(cpuinfo: str) -> int:
    """Return the rate of the host's time stamp counter, which is a TCG guest's too; 0: the host does not say.

    The machine has nothing to calibrate against, and on a busy host a kernel that has not been told hangs for ever
    (arch/x86/kernel/tsc.c). `bogomips` is twice the rate in MHz, as calibrated by the host's kernel.

    Args:
        cpuinfo: text of /proc/cpuinfo.
    """
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "bogomips":
            try:
                return max(0, round(float(value) * 500))
            except (ValueError, OverflowError):
                return 0
    return 0


def qemu_argv(machine: Machine) -> tuple[str, ...]:
    """Return the whole argv."""
    argv = [machine.program, *_processor(machine.accelerator, machine.cpus), *_memory(machine), *_BARE]
    argv += ["-kernel", f"/proc/self/fd/{machine.files['kernel']}"]
    argv += ["-initrd", f"/proc/self/fd/{machine.files['initramfs']}", "-append", machine.cmdline]
    for index, role in enumerate(DISKS):
        if role in machine.files:
            argv += _disk(index, role, machine.files[role], machine.disk_rate)
    argv += ["-chardev", f"socket,id=channel,fd={CHANNEL_FD}", "-device", "virtio-serial-device,max_ports=2"]
    argv += ["-device", f"virtserialport,chardev=channel,name={PORT}"]
    # `append`: a pipe cannot be truncated, which is what opening it would otherwise do.
    argv += ["-add-fd", f"fd={CONSOLE_FD},set={_CONSOLE_SET}", "-serial", "chardev:console"]
    argv += ["-chardev", f"file,id=console,path=/dev/fdset/{_CONSOLE_SET},append=on"]
    argv += ["-device", "virtio-rng-device", "-device", _BALLOON]
    argv += _control(machine)
    if machine.mac:
        argv += _card(machine)
    return (*argv, "-sandbox", SANDBOX)


def probe_argv(program: str, accelerator: Accelerator, kernel: str, initramfs: str, *, clock: int) -> tuple[str, ...]:
    """Return the argv of a machine without disk or channel, whose guest says hello on standard output.

    Args:
        program: path of QEMU.
        accelerator: what is tried.
        kernel: path of an image's kernel.
        initramfs: path of its initramfs.
        clock: as from `clock_khz`; 0 with KVM.
    """
    argv = [program, *_processor(accelerator, 1), "-M", _KIND, "-m", f"{_PROBE_MIB}M", *_BARE]
    words = "console=ttyS0 quiet reboot=t panic=-1 cryptomgr.notests cloister.probe {clock}"
    argv += ["-kernel", kernel, "-initrd", initramfs, "-append", command_line(words, verity="", clock_khz=clock)]
    return (*argv, "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console", "-sandbox", SANDBOX)


def _processor(accelerator: Accelerator, cpus: int) -> list[str]:
    kvm = accelerator == "kvm"
    how = "kvm" if kvm else f"tcg,tb-size={TRANSLATIONS_MIB}"
    return ["-accel", how, "-cpu", _HOSTS if kvm else _EMULATED, "-smp", str(cpus)]


def _memory(machine: Machine) -> list[str]:
    size = f"{machine.memory_mib}M"
    if machine.named_memory:
        backend = f"memory-backend-ram,id=memory,size={size}"
        return ["-M", f"{_KIND},memory-backend=memory", "-m", size, "-object", backend]
    if machine.memory_fd is None:
        return ["-M", _KIND, "-m", size]
    backend = f"memory-backend-file,id=memory,size={size},mem-path=/proc/self/fd/{machine.memory_fd}"
    share = "on" if machine.shared else "off"
    return ["-M", f"{_KIND},memory-backend=memory", "-m", size, "-object", f"{backend},share={share}"]


def _disk(index: int, role: str, descriptor: int, rate: int) -> list[str]:
    # auto-read-only would first try to open for reading, for which an fdset with one writable descriptor has nothing.
    only = f"read-only={'on' if role == 'root' else 'off'},auto-read-only=off"
    file = f"driver=file,node-name={role}-file,filename=/dev/fdset/{index},locking=off,{only}"
    argv = ["-add-fd", f"fd={descriptor},set={index}", "-blockdev", file]
    argv += ["-blockdev", f"driver=raw,node-name={role},file={role}-file,{only}"]
    if not rate:
        return [*argv, "-device", f"virtio-blk-device,drive={role},{_ONLY_DATA}"]
    argv += ["-object", f"throttle-group,id={role}-rate,x-bps-total={rate}"]
    argv += ["-blockdev", f"driver=throttle,node-name={role}-slowed,throttle-group={role}-rate,file={role},{only}"]
    return [*argv, "-device", f"virtio-blk-device,drive={role}-slowed,{_ONLY_DATA}"]


def _card(machine: Machine) -> list[str]:
    """Return a card that moves plain frames and can do nothing else: the same one on a tap and on a hub of its own.

    What a template's guest was offered at its boot is so what there is on a tap. There is no queue of control
    commands: the guest sets its address in the device's configuration space, and the device hears every frame.
    """
    wire = "hubport,id=net,hubid=0" if machine.tap_fd is None else f"tap,id=net,fd={machine.tap_fd}"
    without = ",".join(f"{feature}=off" for feature in _NO_FEATURES)
    return ["-netdev", wire, "-device", f"virtio-net-device,netdev=net,mac={machine.mac},{without}"]


def _control(machine: Machine) -> list[str]:
    argv: list[str] = []
    if machine.qmp:
        argv += ["-qmp", f"unix:{machine.qmp},server=on,wait=off"]
    if machine.orders_fd is not None:
        argv += ["-chardev", f"socket,id=orders,fd={machine.orders_fd}", "-mon", "chardev=orders,mode=control"]
    if machine.incoming:
        argv += ["-incoming", "defer"]
    return argv
