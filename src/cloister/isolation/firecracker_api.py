"""What Firecracker's API takes, as data: bodies of requests, and the versions that know them.

Written from the public description of the API (firecracker.yaml of the project, 1.8 to 1.17). Only what a run needs
stands here: no MMDS, no CPU templates, no hot plugging, no log or metrics files (its own words and its guest's go to
its standard output, which the keeper bounds). Nothing is sent here; `host/firecracker.py` does that, and
`isolation/firecracker.py` says which requests a machine needs.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, NamedTuple

import msgspec

from cloister.errors import UnsupportedError

Version = tuple[int, int, int]

OLDEST: Version = (1, 8, 0)
"""The first that describes its devices by ACPI, which is where Debian's kernel looks for them."""
OVERRIDES_NETWORK: Version = (1, 12, 0)
REPORTS_FREE_PAGES: Version = (1, 14, 0)
OVERRIDES_VSOCK: Version = (1, 16, 0)
ADVANCES_CLOCK: Version = (1, 16, 0)
DEAF_AFTER_RESTORE: Version = (1, 16, 0)
"""In this one a restored guest's vsock stays silent for ever (their pull request 5958, repaired in 1.16.1)."""
MAX_CPUS = 32
GUEST_CID = 3
"""The guest's address on its vsock: the least that is free; each machine has a vsock of its own."""

_VERSION = re.compile(r"(?:Firecracker )?v?(\d{1,4})\.(\d{1,4})\.(\d{1,4})(?:[-+][0-9A-Za-z.+-]{0,64})?")
Id = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_]{1,64}$")]
Positive = Annotated[int, msgspec.Meta(gt=0)]


class Request(NamedTuple):
    """One call: the method, the path, and the JSON that goes with it."""

    method: Literal["GET", "PUT", "PATCH"]
    path: str
    body: bytes = b""


class Body(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of a request; what has its default value is not sent, so older versions need not know it."""


class TokenBucket(Body, frozen=True):
    """So many bytes or operations (`size`) in so many milliseconds."""

    size: Positive
    refill_time: Positive


class RateLimiter(Body, frozen=True):
    """How much a device may move."""

    bandwidth: TokenBucket | None = None
    ops: TokenBucket | None = None


class MachineConfig(Body, frozen=True):
    """`/machine-config`."""

    vcpu_count: Annotated[int, msgspec.Meta(ge=1, le=MAX_CPUS)]
    mem_size_mib: Positive
    track_dirty_pages: bool = False


class BootSource(Body, frozen=True):
    """`/boot-source`. Without `boot_args` Firecracker would use words of its own, among them `nomodule`."""

    kernel_image_path: str
    initrd_path: str
    boot_args: str


class Drive(Body, frozen=True):
    """`/drives/ID`. Never a root device: for that Firecracker would add `root=/dev/vda` to the command line."""

    drive_id: Id
    path_on_host: str
    is_root_device: bool
    is_read_only: bool
    cache_type: Literal["Unsafe", "Writeback"] = "Unsafe"
    rate_limiter: RateLimiter | None = None


class DriveUpdate(Body, frozen=True):
    """`PATCH /drives/ID`, of a machine that is there: its file stays."""

    drive_id: Id
    rate_limiter: RateLimiter


class NetworkInterface(Body, frozen=True):
    """`/network-interfaces/ID`: a tap of the network namespace that Firecracker runs in."""

    iface_id: Id
    host_dev_name: str
    guest_mac: str
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None


class Vsock(Body, frozen=True):
    """`/vsock`: the guest's channel, a Unix socket on this side."""

    guest_cid: int
    uds_path: str


class Entropy(Body, frozen=True):
    """`/entropy`: virtio-rng."""


class Balloon(Body, frozen=True):
    """`/balloon`."""

    amount_mib: int
    deflate_on_oom: bool
    free_page_reporting: bool = False


class BalloonUpdate(Body, frozen=True):
    """`PATCH /balloon`."""

    amount_mib: int


class Action(Body, frozen=True):
    """`/actions`."""

    action_type: Literal["InstanceStart", "SendCtrlAltDel"]


class VmState(Body, frozen=True):
    """`PATCH /vm`."""

    state: Literal["Paused", "Resumed"]


class SnapshotCreate(Body, frozen=True):
    """`/snapshot/create`, of a paused machine."""

    snapshot_path: str
    mem_file_path: str
    snapshot_type: Literal["Full"]


class MemoryBackend(Body, frozen=True):
    """Where a restored guest's memory comes from."""

    backend_type: Literal["File"]
    backend_path: str


class NetworkOverride(Body, frozen=True):
    """Another tap than that of the snapshot."""

    iface_id: Id
    host_dev_name: str


class VsockOverride(Body, frozen=True):
    """Another socket than that of the snapshot."""

    uds_path: str


class SnapshotLoad(Body, frozen=True):
    """`/snapshot/load`, into a fresh process."""

    snapshot_path: str
    mem_backend: MemoryBackend
    resume_vm: bool = False
    network_overrides: tuple[NetworkOverride, ...] = ()
    vsock_override: VsockOverride | None = None
    clock_realtime: bool = False


def put(path: str, body: Body) -> Request:
    """Return the request that sets something."""
    return Request("PUT", path, msgspec.json.encode(body))


def patch(path: str, body: Body) -> Request:
    """Return the request that changes something."""
    return Request("PATCH", path, msgspec.json.encode(body))


def parse_version(text: str) -> Version:
    """Return the version that `GET /version` or `firecracker --version` names, such as `1.16.1`.

    Raises:
        UnsupportedError: it is none, or one older than what the guests need.
    """
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        raise UnsupportedError(
            "firecracker-unavailable",
            f"firecracker says a version that is none: {text[:64]!r}",
            remedy='set `monitor = "qemu"` in [agents.NAME.microvm]',
        )
    version = (int(match[1]), int(match[2]), int(match[3]))
    if version < OLDEST:
        raise UnsupportedError(
            "firecracker-unavailable",
            f"firecracker {name(version)} is older than {name(OLDEST)}, the first that describes its devices by ACPI",
            remedy=f'install {name(OLDEST)} or newer, or set `monitor = "qemu"` in [agents.NAME.microvm]',
        )
    return version


def name(version: Version) -> str:
    """Return a version as people write it."""
    return ".".join(map(str, version))
