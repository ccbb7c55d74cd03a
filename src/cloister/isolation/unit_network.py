"""The unit beside a run in mode `internet`: pasta, which carries the agent's packets to sockets of the agent's account.

The agent's own unit keeps a network namespace of its own, and pasta puts one interface into it. What leaves, leaves by
sockets of this unit, which shares the host's network: they are the account's, so the packet filter judges them by uid,
systemd by this unit's addresses, and the watchdog kills the unit when the filter changes. A filter inside the
namespace has judged them before. Whoever breaks pasta, which reads what the agent sends, is a process of the account
behind that same filter: no capability, no file but the system's, no namespace that counts on the host.

Pure; `host/unit_floor_network.py` holds the result against minimums of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cloister.isolation.firewall_units import BOUND
from cloister.isolation.unit import SHIM, UnitBox, system_mounts
from cloister.plan.unit import NETWORK_PREFIX, SLICE, UnitNetwork

TUN = "/dev/net/tun"
_RESOLVER = "-/etc/resolv.conf:/etc/resolv.conf"
"""The host's own, over that of the assembled `/etc`, which names an address inside."""
_FIXED: tuple[tuple[str, str], ...] = (
    ("Type", "exec"),
    ("Slice", SLICE),
    ("CollectMode", "inactive-or-failed"),
    ("NotifyAccess", "none"),
    ("Delegate", "no"),
    ("KillMode", "mixed"),  # the shim reports its counters when it is told to end, and takes pasta along
    ("TimeoutStopSec", "5s"),
    ("NoNewPrivileges", "yes"),
    ("CapabilityBoundingSet", ""),
    ("AmbientCapabilities", ""),
    ("ProtectSystem", "strict"),
    ("ProtectHome", "yes"),
    ("PrivateMounts", "yes"),
    ("MountAPIVFS", "yes"),
    ("PrivateTmp", "yes"),
    ("PrivateDevices", "yes"),
    ("BindPaths", TUN),
    ("DevicePolicy", "closed"),
    ("DeviceAllow", f"{TUN} rw"),
    ("InaccessiblePaths", "+/sys"),
    ("PrivateIPC", "yes"),
    ("PrivateUsers", "yes"),
    ("ProtectProc", "invisible"),
    ("ProtectKernelTunables", "yes"),
    ("ProtectKernelModules", "yes"),
    ("ProtectKernelLogs", "yes"),
    ("ProtectControlGroups", "yes"),
    ("ProtectClock", "yes"),
    ("ProtectHostname", "yes"),
    ("RestrictNamespaces", "user net mnt ipc uts pid"),  # the shim makes two, pasta enters them and leaves the host's
    ("RestrictRealtime", "yes"),
    ("RestrictSUIDSGID", "yes"),
    ("LockPersonality", "yes"),
    ("MemoryDenyWriteExecute", "yes"),
    ("KeyringMode", "private"),
    ("RemoveIPC", "yes"),
    ("UMask", "0077"),
    ("SystemCallArchitectures", "native"),
    ("SystemCallErrorNumber", "EPERM"),
    ("SystemCallFilter", "@system-service @mount pivot_root unshare setns"),
    ("SystemCallFilter", "~@clock @cpu-emulation @debug @keyring @module @obsolete @raw-io @reboot @resources @swap"),
    ("SystemCallFilter", "~io_uring_setup io_uring_enter io_uring_register userfaultfd name_to_handle_at"),
    ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6 AF_NETLINK"),
    ("TasksMax", "32"),
    ("MemoryMax", str(256 << 20)),
    ("MemorySwapMax", "0"),
    ("LimitCORE", "0"),
)


class Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """What systemd lets a unit reach and what not (CIDR): what stands in both may be reached."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


def network_unit(run: str, box: UnitBox, outside: Addresses) -> UnitNetwork:
    """Return the unit that goes with the unit of a run.

    Args:
        run: its id.
        box: what decides the properties of the agent's own unit.
        outside: addresses on the host's network that systemd lets pasta reach, and those that it does not.
    """
    return UnitNetwork(
        unit=f"{NETWORK_PREFIX}{run}.service",
        argv=(SHIM, "network"),
        properties=(
            ("User", box.account),
            ("Group", box.account),
            *_FIXED,
            *_mounts(box),
            *_addresses(outside),
            *BOUND,
        ),
    )


def _mounts(box: UnitBox) -> Iterator[tuple[str, str]]:
    """Yield what the agent sees too of the system, and how the host resolves names."""
    yield from system_mounts(box)
    yield "BindReadOnlyPaths", _RESOLVER


def _addresses(outside: Addresses) -> Iterator[tuple[str, str]]:
    """Yield what systemd itself refuses: the third layer, under both packet filters."""
    if outside.allow:
        yield "IPAddressAllow", " ".join(outside.allow)
    yield "IPAddressDeny", " ".join(outside.deny)
