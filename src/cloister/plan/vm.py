"""How a run with `isolation = "microvm"` is started, as data: which verified image, which disks, which machine.

It holds no secret: what a guest gets to know comes over the channel after its boot (ARCHITECTURE.md, "Runs in
microVMs"). The argv of the jail, the keeper and the monitor is that of the `Launch` this hangs on.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

FIRST_FILE = 5
"""Descriptors of `Launch` before it: 3 the jail's seccomp filter, 4 the keeper's channel to the broker."""
CHANNEL_FD = 20
"""Where the monitor finds its end of the guest's channel, a connected Unix stream socket."""
CONSOLE_FD = 21
"""Where the monitor writes what the guest prints: a pipe that the keeper empties into a bounded file."""
DIRECTORY = "vm"
"""In the run's runtime directory: the console and the monitor's sockets. In its records: the workspace's disk."""
CONSOLE = "console.log"
WORKSPACE_DISK = "workspace.img"
VAR_DISK = "var.img"
"""In an agent's state for a project."""

FIRST_NUMBER = 0x78000000
"""Of the monitors that root starts: above what systemd's containers and directories of accounts give out (systemd's
docs/UIDS-GIDS.md; sssd-ad(5), ldap_idmap_range_max), below the signed end."""
NUMBERS = 1 << 24
"""How many there are from there on."""

Accelerator = Literal["kvm", "tcg"]
Monitor = Literal["qemu", "firecracker"]
Role = Literal[
    "kernel", "initramfs", "root", "var", "workspace", "memory", "state", "orders", "memory-out", "state-out"
]
"""`memory` and `state` are those of a template or a snapshot, handed out as sealed copies; `orders` is a socket.

Into `memory-out` and `state-out` Firecracker writes its guest when that is kept. What is not on the disk has no path.
"""


class VmFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that the monitor gets by descriptor: `FIRST_FILE` and upwards, in the order of `VmLaunch.files`."""

    role: Role
    path: str
    write: bool = False
    digest: str = ""
    """SHA-256 that a read-only file must have: kernel and initramfs; the root is held by its verity tree."""


class VmCarried(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A path of the home of which the guest gets a copy."""

    name: str
    """Below the home."""
    source: str
    kind: Literal["file", "directory"]


class VmLaunch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The virtual machine of one run."""

    image: str
    version: int
    manifest: str
    """SHA-256 of the signed manifest."""
    monitor: Monitor
    accelerator: Accelerator
    memory_mib: int
    cpus: int
    files: tuple[VmFile, ...]
    fields: tuple[str, ...]
    """`NAME=VALUE` words of the frame `B` for the guest; the keeper adds what must be fresh (entropy, time)."""
    inner: tuple[str, ...]
    """The argv of the shim's inner half in the guest."""
    directory: str
    """The run's directory for the console and the monitor's sockets."""
    monitor_uid: int = 0
    """The number, as user and as group, under which the monitor runs where root starts it; 0: that of who does."""
    disk_bytes: int
    """Of the disk for `/var`, and what may be added in the workspace."""
    disk_rate: int = 0
    """Bytes that each disk may move in a second; 0: no bound of ours."""
    carried: tuple[VmCarried, ...] = ()
    secrets: tuple[str, ...] = ()
    """Paths of the host that are left out of what is carried."""
    homed: tuple[tuple[str, str], ...] = ()
    """Files below the home, each with its name in the box, of which it is a copy."""
    seeds: tuple[tuple[str, str], ...] = ()
    """Files below the home that are written where there is none, each with its text."""
    ports: tuple[int, ...] = ()
    """Of the guest's 127.0.0.1, reachable on the same port of ours; their listeners come behind the files."""
    network: Literal["none", "bridge"] = "none"
    program: str = ""
    """Path of the monitor."""
    cmdline: str = ""
    """Of the guest's kernel."""
    model: str = ""
    """The one model that it may use, where its caller has narrowed that."""
    snapshot: str = ""
    """The snapshot whose disks it gets; empty for the agent's own, and a new copy of the workspace."""
    resumes: str = ""
    """Digest of the record of the snapshot from whose memory its processes go on; empty: they begin."""
    template: str = ""
    """Digest of the record of the template that it starts from, warm; empty for a cold boot."""

    def describe(self) -> str:
        """Return one line for people."""
        how = f"{self.monitor} ({self.accelerator})"
        size = f"{self.memory_mib} MiB, {self.cpus} CPU{', from a template' if self.template else ''}"
        size += ", going on from a snapshot's memory" if self.resumes else ""
        card = ", with a network device on the system's bridge" if self.network == "bridge" else ""
        card += f", its monitor is user {self.monitor_uid}" if self.monitor_uid else ""
        return f"virtual machine of image {self.image} {self.version} by {how}: {size}{card}"


def number_of(name: str) -> int:
    """Return the number under which the monitor of something of root's runs: the same for the same name."""
    return FIRST_NUMBER + int.from_bytes(hashlib.sha256(f"monitor:{name}".encode()).digest()[:4], "big") % NUMBERS
