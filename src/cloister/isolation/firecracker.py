"""Firecracker as a run's monitor: its argv, and the requests that make and start the machine of a `VmLaunch`.

The files of the plan are named `/proc/self/fd/N`: Firecracker opens again what the jail was given, so its own sandbox
holds no path of the host, and what boots is the file that was verified. It makes its guest's channel itself: a Unix
socket in the run's directory, where one writes `CONNECT 5000` first (their docs/vsock.md). Its seccomp filters are on
by default and stay so.

Nothing is sent here (`host/firecracker.py`), and no jail is built: that is `isolation/monitor_jail.py` for a run of a
user, and `isolation/firecracker_jailer.py` for one of root.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec

from cloister.errors import UnsupportedError
from cloister.isolation import firecracker_api as api
from cloister.plan.vm import FIRST_FILE, VmLaunch

API_SOCKET = "api.sock"
CHANNEL_SOCKET = "vsock.sock"
"""Names in the run's `vm` directory."""
PORT = 5000
"""Of the guest's end of the link, on its vsock."""
NETWORK = "eth0"
_DISKS = ("root", "var", "workspace")
"""In the order in which the guest sees them: vda, vdb, vdc."""
_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_FORBIDDEN_WORDS = re.compile(r"[^\x20-\x7e]")
_REFILL_MS = 1000


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """How much a device may move in a second: bytes and operations; 0 means as much as it can."""

    bytes_per_s: int = 0
    operations_per_s: int = 0

    def limiter(self) -> api.RateLimiter | None:
        """Return it as Firecracker wants it: buckets that are full again after a second."""
        if not self.bytes_per_s and not self.operations_per_s:
            return None
        bandwidth = api.TokenBucket(size=self.bytes_per_s, refill_time=_REFILL_MS) if self.bytes_per_s else None
        ops = api.TokenBucket(size=self.operations_per_s, refill_time=_REFILL_MS) if self.operations_per_s else None
        return api.RateLimiter(bandwidth=bandwidth, ops=ops)


class Tap(msgspec.Struct, frozen=True, kw_only=True):
    """The guest's network device: a tap of Firecracker's network namespace, and the address of the guest's side."""

    name: str
    mac: str


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where things lie as Firecracker sees them."""

    directory: str
    """The run's own `vm` directory: sockets and snapshots."""
    files: tuple[str, ...] = ()
    """Names of the plan's files, in their order; by default the descriptors that the jail was given."""

    def inside(self, name: str) -> str:
        """Return the path of something in the directory."""
        return f"{self.directory.rstrip('/')}/{name}"

    def file(self, number: int) -> str:
        """Return the path of a file of the plan, by its place in `VmLaunch.files`."""
        return self.files[number] if self.files else f"/proc/self/fd/{FIRST_FILE + number}"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a `VmLaunch` does not say itself."""

    cmdline: str
    """The kernel's command line, filled in."""
    disks: Rate = Rate()
    network: Rate = Rate()
    tap: Tap | None = None
    snapshots: bool = False
    """Whether snapshots will be taken of it: memory that was written is then kept count of."""


def monitor_argv(program: str, place: Place, run: str) -> tuple[str, ...]:
    """Return how it is started, under a jail that is already there: no machine yet, only its API."""
    return (program, "--id", checked_id(run), "--api-sock", place.inside(API_SOCKET))


def checked_id(run: str) -> str:
    """Return an instance's name as Firecracker and its jailer take it.

    Raises:
        UnsupportedError: it has other characters than letters, digits and hyphens, or more than 64.
    """
    if not _ID.fullmatch(run):
        raise UnsupportedError("firecracker-refused", f"{run[:80]!r} is no name of an instance that firecracker takes")
    return run


def start_requests(launch: VmLaunch, machine: Machine, place: Place, version: api.Version) -> tuple[api.Request, ...]:
    """Return the calls that make the machine and start it, in their order; the last one starts it.

    Raises:
        UnsupportedError: firecracker cannot have such a machine.
    """
    check(launch, machine)
    return (*_configuration(launch, machine, place, version), start())


def warm_requests(launch: VmLaunch, machine: Machine, place: Place, version: api.Version) -> tuple[api.Request, ...]:
    """Return the calls that have a fresh process go on from a template or a kept memory; the last one lets it go.

    Its disks are those of this run: the same descriptors' numbers lead to other files. What each may move is told
    before the guest goes, since a template's have no bound.

    Raises:
        UnsupportedError: firecracker cannot have such a machine, or this version restores none that can be talked to.
    """
    check(launch, machine)
    files: dict[str, int] = {file.role: number for number, file in enumerate(launch.files)}
    limiter = machine.disks.limiter()
    state, memory = place.file(files["state"]), place.file(files["memory"])
    load = load_snapshot(state, memory, place, version, resume=limiter is None, tap=machine.tap)
    if limiter is None:
        return (load,)
    bounds = (
        api.patch(f"/drives/{role}", api.DriveUpdate(drive_id=role, rate_limiter=limiter))
        for role in _DISKS
        if role in files
    )
    return (load, *bounds, set_state("Resumed"))


def start() -> api.Request:
    """Return the call that boots."""
    return api.put("/actions", api.Action(action_type="InstanceStart"))


def ask_to_end() -> api.Request:
    """Return the call that presses Ctrl-Alt-Del in the guest."""
    return api.put("/actions", api.Action(action_type="SendCtrlAltDel"))


def set_state(state: str) -> api.Request:
    """Return the call that holds the machine still, or lets it go on."""
    return api.patch("/vm", api.VmState(state="Paused" if state == "Paused" else "Resumed"))


def set_balloon(mib: int) -> api.Request:
    """Return the call that takes so much memory from the guest."""
    return api.patch("/balloon", api.BalloonUpdate(amount_mib=mib))


def create_snapshot(state: str, memory: str) -> api.Request:
    """Return the call that writes a paused machine into two files, named as firecracker sees them."""
    body = api.SnapshotCreate(snapshot_path=state, mem_file_path=memory, snapshot_type="Full")
    return api.put("/snapshot/create", body)


def keep_request(launch: VmLaunch, place: Place, version: api.Version) -> api.Request:
    """Return the call that writes a paused machine of a run into the files that it was given for that.

    Raises:
        UnsupportedError: no machine could be restored from it.
    """
    refuse_deaf(version)
    files: dict[str, int] = {file.role: number for number, file in enumerate(launch.files)}
    return create_snapshot(place.file(files["state-out"]), place.file(files["memory-out"]))


def refuse_deaf(version: api.Version) -> None:
    """Refuse a version that restores a guest that nobody can talk to.

    Raises:
        UnsupportedError: `firecracker-refused`.
    """
    if version == api.DEAF_AFTER_RESTORE:
        raise UnsupportedError(
            "firecracker-refused",
            f"a guest that firecracker {api.name(version)} restores cannot be talked to any more",
            remedy="install firecracker 1.16.1 or newer",
        )


def load_snapshot(  # noqa: PLR0913  (each is a field of the request)
    state: str, memory: str, place: Place, version: api.Version, *, resume: bool, tap: Tap | None = None
) -> api.Request:
    """Return the call that restores a machine in a fresh process: its memory is mapped, copied where it is written.

    The guest's clock is set by the link's `J` and `B` anyway; where firecracker can, it advances it by itself.

    Raises:
        UnsupportedError: this version cannot, or restores a guest that nobody can talk to.
    """
    refuse_deaf(version)
    if tap is not None and version < api.OVERRIDES_NETWORK:
        raise UnsupportedError(
            "firecracker-refused",
            f"firecracker {api.name(version)} cannot restore a machine onto another tap",
            remedy=f"install {api.name(api.OVERRIDES_NETWORK)} or newer",
        )
    vsock = api.VsockOverride(uds_path=place.inside(CHANNEL_SOCKET)) if version >= api.OVERRIDES_VSOCK else None
    body = api.SnapshotLoad(
        snapshot_path=state,
        mem_backend=api.MemoryBackend(backend_type="File", backend_path=memory),
        resume_vm=resume,
        network_overrides=() if tap is None else (api.NetworkOverride(iface_id=NETWORK, host_dev_name=tap.name),),
        vsock_override=vsock,
        clock_realtime=version >= api.ADVANCES_CLOCK,
    )
    return api.put("/snapshot/load", body)


def _configuration(launch: VmLaunch, machine: Machine, place: Place, version: api.Version) -> Iterator[api.Request]:
    """Make everything that must be there before the start."""
    files: dict[str, int] = {file.role: number for number, file in enumerate(launch.files)}
    config = api.MachineConfig(
        vcpu_count=launch.cpus, mem_size_mib=launch.memory_mib, track_dirty_pages=machine.snapshots
    )
    yield api.put("/machine-config", config)
    boot = api.BootSource(
        kernel_image_path=place.file(files["kernel"]),
        initrd_path=place.file(files["initramfs"]),
        boot_args=machine.cmdline,
    )
    yield api.put("/boot-source", boot)
    yield from _drives(files, machine, place)
    if machine.tap is not None:
        limiter = machine.network.limiter()
        interface = api.NetworkInterface(
            iface_id=NETWORK,
            host_dev_name=machine.tap.name,
            guest_mac=machine.tap.mac,
            rx_rate_limiter=limiter,
            tx_rate_limiter=limiter,
        )
        yield api.put(f"/network-interfaces/{NETWORK}", interface)
    yield api.put("/vsock", api.Vsock(guest_cid=api.GUEST_CID, uds_path=place.inside(CHANNEL_SOCKET)))
    yield api.put("/entropy", api.Entropy())
    reporting = version >= api.REPORTS_FREE_PAGES
    yield api.put("/balloon", api.Balloon(amount_mib=0, deflate_on_oom=True, free_page_reporting=reporting))


def _drives(files: Mapping[str, int], machine: Machine, place: Place) -> Iterator[api.Request]:
    """Make the disks, in the order in which the guest shall see them."""
    for role in _DISKS:
        if role not in files:
            continue
        drive = api.Drive(
            drive_id=role,
            path_on_host=place.file(files[role]),
            is_root_device=False,
            is_read_only=role == "root",
            # What the guest flushes is on the disk: a workspace must not be lost because the host's power was.
            cache_type="Unsafe" if role == "root" else "Writeback",
            rate_limiter=machine.disks.limiter(),
        )
        yield api.put(f"/drives/{role}", drive)


def check(launch: VmLaunch, machine: Machine) -> None:
    """Refuse what firecracker cannot have, before anything is started.

    Raises:
        UnsupportedError: `firecracker-refused`.
    """
    if launch.accelerator != "kvm":
        raise _refusal("it needs KVM, and has no emulation")
    if not 1 <= launch.cpus <= api.MAX_CPUS:
        raise _refusal(f"it has 1 to {api.MAX_CPUS} processors, not {launch.cpus}")
    roles = [file.role for file in launch.files]
    if len(set(roles)) != len(roles) or not {"kernel", "initramfs", "root"} <= set(roles):
        raise _refusal("the plan does not name kernel, initramfs and root, each once")
    if any(file.write for file in launch.files if file.role in {"kernel", "initramfs", "root"}):
        raise _refusal("the plan would have kernel, initramfs or root writable")
    if _FORBIDDEN_WORDS.search(machine.cmdline) or not machine.cmdline:
        raise _refusal("the kernel's command line is empty, or has characters that are not printable ASCII")


def _refusal(why: str) -> UnsupportedError:
    return UnsupportedError(
        "firecracker-refused",
        f"firecracker cannot run this machine: {why}",
        remedy='set `monitor = "qemu"` in [agents.NAME.microvm]',
    )
