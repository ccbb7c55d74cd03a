"""The properties of a unit as the manager takes them over D-Bus, and the call that starts a transient unit of them.

`systemd-run -p` turns the same words into the same values (shared/bus-unit-util.c), but is a program: loading it costs
a start more than all that it does. Each name of the floor has its form here, and no other name has one; the
manager refuses a name that it does not know. That both ways make the same unit of every property is seen
in the unit files that 252, 254, 257 and 262 write of them (tests/systemd/test_unit_asked.py).

Sources: org.freedesktop.systemd1(5), D-Bus Specification ("Marshaling").
"""

from __future__ import annotations

import errno
import ipaddress
import math
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

from cloister.host.systemd_manager import Writer
from cloister.host.unit_limits import amount, seconds

START = "ssa(sv)a(sa(sv))"
"""The signature of StartTransientUnit: name, mode, properties, other units to be made with it."""
NO_END = (1 << 64) - 1
_MS_REC = 0x4000
_NAMESPACES = {
    "mnt": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000, "user": 0x10000000,
    "pid": 0x20000000, "net": 0x40000000,
}  # fmt: skip
_RANGES = {"any": ("0.0.0.0/0", "::/0"), "localhost": ("127.0.0.0/8", "::1/128")}
_ALIGNED = {"(": 8, "t": 8, "y": 1, "g": 1}

Typed = tuple[str, str, Any]
"""Name, type and value of a property, as D-Bus has them."""


def start_call(unit: str, properties: tuple[tuple[str, str], ...], argv: tuple[str, ...]) -> bytearray:
    """Return the body of StartTransientUnit: the command as it stands, descriptors 0 to 2 of the call as its streams.

    Raises:
        ValueError: a property has no form here, or a value is not of its form.
    """
    typed = [one for name, value in properties for one in convert(name, value)]
    typed += [(f"Standard{name}FileDescriptor", "h", at) for at, name in enumerate(("Input", "Output", "Error"))]
    typed.append(("ExecStartEx", "a(sasas)", [(argv[0], list(argv), ["no-env-expand"])]))
    body = Writer()
    body.string(unit)
    body.string("fail")  # never instead of one that exists
    with body.array():
        for name, kind, value in typed:
            body.align(8)
            body.string(name)
            _write_signature(body, kind)
            _write(body, kind, value)
    with body.array():
        pass
    return body.data


def convert(name: str, value: str) -> list[Typed]:
    """Return what a property of `systemd-run -p` is on D-Bus; it may be more than one.

    Raises:
        ValueError: it has no form here, or the value is not of its form.
    """
    form = FORMS.get(name)
    if form is None:
        raise ValueError(f"{name} has no form")
    return list(form(name, value))


def _text(name: str, value: str) -> Iterator[Typed]:
    yield name, "s", value


def _flag(name: str, value: str) -> Iterator[Typed]:
    yield name, "b", _truth(value)


def _flag_or_more(name: str, value: str) -> Iterator[Typed]:
    """A property that was a flag once, and has a second one for what a flag cannot say."""
    if value in _TRUTHS:
        yield name, "b", _TRUTHS[value]
    else:
        yield f"{name}Ex", "s", value


def _text_of_truth(name: str, value: str) -> Iterator[Typed]:
    yield name, "s", "yes" if _truth(value) else "no"


_TRUTHS = {"yes": True, "true": True, "1": True, "no": False}


def _truth(value: str) -> bool:
    if value not in _TRUTHS:
        raise ValueError(f"{value!r} is neither yes nor no")
    return _TRUTHS[value]


def _words(name: str, value: str) -> Iterator[Typed]:
    yield name, "as", value.split()


def _path(name: str, value: str) -> Iterator[Typed]:
    yield name, "as", [value]


def _size(name: str, value: str) -> Iterator[Typed]:
    yield name, "t", NO_END if value == "infinity" else amount(value)


def _limit(name: str, value: str) -> Iterator[Typed]:
    """A limit of setrlimit(2), hard and soft."""
    number = NO_END if value == "infinity" else amount(value)
    yield name, "t", number
    yield f"{name}Soft", "t", number


def _limit_of_time(name: str, value: str) -> Iterator[Typed]:
    number = NO_END if value == "infinity" else math.ceil(seconds(value))
    yield name, "t", number
    yield f"{name}Soft", "t", number


def _time(name: str, value: str) -> Iterator[Typed]:
    span = seconds(value)
    yield f"{name.removesuffix('Sec')}USec", "t", NO_END if math.isinf(span) else round(span * 1_000_000)


def _quota(name: str, value: str) -> Iterator[Typed]:
    yield f"{name}PerSecUSec", "t", round(float(value.removesuffix("%")) * 100) * 100


def _capabilities(name: str, value: str) -> Iterator[Typed]:
    if value:
        raise ValueError(f"{name} is not empty")
    yield name, "t", 0


def _namespaces(name: str, value: str) -> Iterator[Typed]:
    """The number is the set of those that are allowed: flags of clone(2)."""
    if value in _TRUTHS:
        if not _TRUTHS[value]:
            raise ValueError(f"{name} does not restrict")
        yield name, "t", 0
        return
    unknown = set(value.split()) - set(_NAMESPACES)
    if unknown:
        raise ValueError(f"{name}: {unknown.pop()!r} is no namespace")
    yield name, "t", sum(_NAMESPACES[word] for word in set(value.split()))


def _devices(name: str, value: str) -> Iterator[Typed]:
    path, _, access = value.partition(" ")
    yield name, "a(ss)", [(path, access)]


def _list(name: str, value: str) -> Iterator[Typed]:
    """Return names that are allowed, or with `~` refused."""
    words = value.removeprefix("~").split()
    yield name, "(bas)", (not value.startswith("~"), [] if words == ["none"] else words)


def _addresses(name: str, value: str) -> Iterator[Typed]:
    ranges = [ipaddress.ip_network(one) for word in value.split() for one in _RANGES.get(word, (word,))]
    family = {4: socket.AF_INET, 6: socket.AF_INET6}
    found = [(int(family[one.version]), one.network_address.packed, one.prefixlen) for one in ranges]
    yield name, "a(iayu)", found


def _binds(name: str, value: str) -> Iterator[Typed]:
    source, _, rest = value.removeprefix("-").partition(":")
    target, _, how = rest.partition(":")
    yield name, "a(ssbt)", [(source, target or source, value.startswith("-"), 0 if how == "norbind" else _MS_REC)]


def _tmpfs(name: str, value: str) -> Iterator[Typed]:
    path, _, options = value.partition(":")
    yield name, "a(ss)", [(path, options)]


def _mode(name: str, value: str) -> Iterator[Typed]:
    yield name, "u", int(value, 8)


def _number(name: str, value: str) -> Iterator[Typed]:
    yield name, "i", int(value)


def _signal(name: str, value: str) -> Iterator[Typed]:
    yield name, "i", int(signal.Signals[value])


def _error(name: str, value: str) -> Iterator[Typed]:
    number = {word: code for code, word in errno.errorcode.items()}.get(value)
    if number is None:
        raise ValueError(f"{value!r} is no error")
    yield name, "i", number


FORMS: dict[str, Callable[[str, str], Iterator[Typed]]] = {
    **dict.fromkeys(
        (
            *("User", "Group", "DevicePolicy", "ProtectSystem", "ProtectHome", "ProtectProc", "ProcSubset"),
            *("KeyringMode", "RootDirectory", "WorkingDirectory", "Slice", "Type", "NotifyAccess", "CollectMode"),
            *("KillMode", "OOMPolicy", "Description", "SyslogIdentifier", "LogNamespace"),
            *("ProtectControlGroupsEx", "PrivateTmpEx", "PrivateUsersEx"),
        ),
        _text,
    ),
    **dict.fromkeys(
        (
            *("NoNewPrivileges", "PrivateDevices", "PrivateIPC", "ProtectKernelTunables", "ProtectKernelModules"),
            *("ProtectKernelLogs", "ProtectClock", "RestrictRealtime", "RestrictSUIDSGID", "LockPersonality"),
            *("RemoveIPC", "PrivateNetwork", "MountAPIVFS", "MemoryDenyWriteExecute", "PrivateMounts"),
            *("CPUAccounting", "MemoryAccounting", "TasksAccounting", "IOAccounting", "Delegate", "SendSIGKILL"),
            *("BindLogSockets", "RootEphemeral", "SetLoginEnvironment"),
        ),
        _flag,
    ),
    **dict.fromkeys(("ProtectControlGroups", "ProtectHostname", "PrivateTmp", "PrivateUsers"), _flag_or_more),
    **dict.fromkeys(("SupplementaryGroups", "SystemCallArchitectures", "BindsTo", "After"), _words),
    **dict.fromkeys(("MemoryMax", "MemoryHigh", "MemorySwapMax", "TasksMax", "CPUWeight", "IOWeight"), _size),
    **dict.fromkeys(("TimeoutStopSec", "TimeoutStartSec", "RuntimeMaxSec"), _time),
    **dict.fromkeys(("CapabilityBoundingSet", "AmbientCapabilities"), _capabilities),
    **dict.fromkeys(("RestrictAddressFamilies", "RestrictFileSystems", "SystemCallFilter"), _list),
    **dict.fromkeys(("IPAddressDeny", "IPAddressAllow"), _addresses),
    **{f"Limit{name}": _limit for name in ("CORE", "NOFILE", "NPROC", "FSIZE", "DATA", "STACK", "AS", "MEMLOCK")},
    **dict.fromkeys(("Nice", "OOMScoreAdjust"), _number),
    "LimitCPU": _limit_of_time,
    "PrivatePIDs": _text_of_truth,
    "RestrictNamespaces": _namespaces,
    "SystemCallErrorNumber": _error,
    "TemporaryFileSystem": _tmpfs,
    "UMask": _mode,
    "CPUQuota": _quota,
    "BindPaths": _binds,
    "BindReadOnlyPaths": _binds,
    "DeviceAllow": _devices,
    "NetworkNamespacePath": _text,
    "InaccessiblePaths": _path,
    "KillSignal": _signal,
}
"""Of each property of `unit_floor` but the three standard streams, which are descriptors."""


def _write_signature(body: Writer, kind: str) -> None:
    body.data += bytes([len(kind)]) + kind.encode() + b"\0"


def _write(body: Writer, kind: str, value: Any) -> None:
    """Write a value of one complete type."""
    match kind[0]:
        case "s":
            body.string(value)
        case "b" | "u" | "h":
            body.number("I", int(value))
        case "i":
            body.number("i", value)
        case "t":
            body.number("Q", value)
        case "y":
            body.number("B", value)
        case "(":
            body.align(8)
            for part, item in zip(_parts(kind[1:-1]), value, strict=True):
                _write(body, part, item)
        case "a":
            _write_array(body, kind[1:], value)
        case _:
            raise ValueError(f"type {kind!r}")


def _write_array(body: Writer, kind: str, items: Any) -> None:
    body.number("I", 0)
    place = len(body.data)
    body.align(_ALIGNED.get(kind[0], 4))
    start = len(body.data)
    for item in items:
        _write(body, kind, item)
    body.data[place - 4 : place] = (len(body.data) - start).to_bytes(4, "little")


def _parts(kinds: str) -> Iterator[str]:
    """Yield the complete types of a signature, one by one."""
    start = depth = 0
    for at, char in enumerate(kinds):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if depth == 0 and char != "a":
            yield kinds[start : at + 1]
            start = at + 1
