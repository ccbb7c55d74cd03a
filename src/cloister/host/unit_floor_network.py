"""The floor under the unit that connects a run in mode `internet`: what pasta is told, and in what it runs.

It is the one process of an account that shares the host's network, so everything about it stands here word for word,
apart from the compiler (`isolation/unit_network.py`): a property, an option or a value that is not named is refused.
Everything in it is the account's, and the packet filter of the account must be loaded: the caller looks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cloister.plan.firewall import WATCHDOG_UNIT
from cloister.plan.unit import NETWORK_PREFIX, SKELETON, SLICE, UnitLaunch

TUN = "/dev/net/tun"
_YES = "yes"
_ADDRESSES = r"[0-9a-f.:/]+( [0-9a-f.:/]+)*"
_CALLS = (
    "@system-service @mount pivot_root unshare setns",
    "~@clock @cpu-emulation @debug @keyring @module @obsolete @raw-io @reboot @resources @swap",
    "~io_uring_setup io_uring_enter io_uring_register userfaultfd name_to_handle_at",
)
_PROPERTIES: dict[str, str] = {
    **dict.fromkeys(
        (
            *("NoNewPrivileges", "PrivateDevices", "PrivateIPC", "PrivateUsers", "PrivateMounts", "PrivateTmp"),
            *("ProtectHome", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectClock"),
            *("ProtectControlGroups", "ProtectHostname", "RestrictRealtime", "RestrictSUIDSGID", "LockPersonality"),
            *("MemoryDenyWriteExecute", "RemoveIPC", "MountAPIVFS"),
        ),
        _YES,
    ),
    "Type": "exec",
    "Slice": re.escape(SLICE),
    "CollectMode": "inactive-or-failed",
    "NotifyAccess": "none",
    "Delegate": "no",
    "KillMode": "mixed",
    "TimeoutStopSec": "[1-9]s",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "ProtectSystem": "strict",
    "ProtectProc": "invisible",
    "BindPaths": re.escape(TUN),
    "DevicePolicy": "closed",
    "DeviceAllow": re.escape(f"{TUN} rw"),
    "InaccessiblePaths": r"\+/sys",
    "RestrictNamespaces": "user net mnt ipc uts pid",
    "KeyringMode": "private",
    "UMask": "0077",
    "SystemCallArchitectures": "native",
    "SystemCallErrorNumber": "EPERM",
    "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "TasksMax": "[1-9][0-9]?",
    "MemoryMax": "[1-9][0-9]{0,8}",
    "MemorySwapMax": "0",
    "LimitCORE": "0",
    "RootDirectory": re.escape(SKELETON),
    "WorkingDirectory": "/",
    "IPAddressDeny": _ADDRESSES,
    "BindsTo": re.escape(WATCHDOG_UNIT),
    "After": re.escape(WATCHDOG_UNIT),
}
"""All must stand once; besides them `User`, `Group`, `SystemCallFilter`, `BindReadOnlyPaths` and `IPAddressAllow`."""
_SEVERAL = ("SystemCallFilter", "BindReadOnlyPaths")
_RESOLVER = "-/etc/resolv.conf:/etc/resolv.conf"
_OPTIONS: tuple[tuple[str, str | None], ...] = (
    ("-f", None),
    ("-q", None),
    ("--config-net", None),
    ("--no-map-gw", None),
    ("-t", "none"),
    ("-u", "none"),
    ("-T", "none"),
    ("-U", "none"),
    ("--no-dhcp", None),
    ("--no-dhcpv6", None),
    ("--no-ra", None),
    ("-P", "/dev/stdout"),
)
"""Of pasta(1): no port of the host's is forwarded in either direction, and no address leads to its loopback."""
_SHOWN = {"-I", "-M", "-a", "-n", "-g", "--dns-forward"}
"""What the agent's interface looks like: names and addresses inside."""
_VALUE = re.compile(r"[0-9a-z][0-9a-z.:]{0,63}")
_LARGEST_RULES = 1 << 20


def wrong_network(run: str, unit: UnitLaunch, binds: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield what root does not do about a run's network, each with where it stands.

    Args:
        run: the run's id.
        unit: the agent's, whose `network` is looked at.
        binds: what of the system may be mounted: the agent's own unit has been held against the floor with these.
    """
    network = unit.network
    if network is None:
        return
    if network.unit != f"{NETWORK_PREFIX}{run}.service":
        yield "the unit of the network has a name that is not the run's", network.unit
    names = [name for name, _ in network.properties]
    for name, value in network.properties:
        if name not in _SEVERAL and names.count(name) > 1:
            yield "a property stands twice", name
        if why := _wrong_property(name, value, unit.account, binds):
            yield why, f"{name}={value[:200]}"
    for name in (*_PROPERTIES, *_SEVERAL, "User", "Group"):
        if name not in names:
            yield "the unit of the network lacks a property", name
    calls = tuple(value for name, value in network.properties if name == "SystemCallFilter")
    if calls != _CALLS:
        yield "system calls that no unit of a network gets", " ".join(calls)[:200]


def wrong_pasta(words: tuple[str, ...], ruleset: str) -> Iterator[tuple[str, str]]:
    """Yield what of pasta's argv and of the rules inside is not to be; its program is looked at elsewhere."""
    missing = dict(_OPTIONS)
    rest = list(words[1:])
    while rest:
        option = rest.pop(0)
        if option in missing:
            value = missing.pop(option)
            if value is not None and (not rest or rest.pop(0) != value):
                yield "pasta is told something else", option
        elif option not in _SHOWN or not rest or not _VALUE.fullmatch(rest.pop(0)):
            yield "pasta is told something that root does not tell it", option[:64]
    if missing:
        yield "pasta is not told to", next(iter(missing))
    if not 0 < len(ruleset) <= _LARGEST_RULES:
        yield "a network namespace gets a packet filter of its own", f"{len(ruleset)} characters"


def _wrong_property(name: str, value: str, account: str, binds: tuple[str, ...]) -> str:
    """Return why root does not set this property; empty where it may."""
    if name == "SystemCallFilter":
        return ""  # judged as a whole
    if name == "BindReadOnlyPaths":
        return "" if value in (*binds, _RESOLVER) else "the unit of the network sees what the agent's does not"
    if name in {"User", "Group"}:
        return "" if value == account else "the unit of the network runs as somebody else"
    pattern = _ADDRESSES if name == "IPAddressAllow" else _PROPERTIES.get(name)
    fits = pattern is not None and re.fullmatch(pattern, value)
    return "" if fits else "root sets no such property, or not to this value"
