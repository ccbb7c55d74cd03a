"""A living machine, as its owner asks it: which process it is, what it takes, how much memory its guest may keep."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from cloister.errors import StepError, UsageError
from cloister.host import qmp
from cloister.isolation.firecracker import API_SOCKET
from cloister.plan.vm import VmLaunch

if TYPE_CHECKING:
    from cloister.runs.vm_firecracker import FirecrackerDriver

_QMP = "qmp.sock"
T = TypeVar("T")
_MIB = 1 << 20
_KIB = 1024
_TICKS = os.sysconf("SC_CLK_TCK")
_LEAST_MIB = 64
"""A guest with less could not even end in order."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one machine takes of the host."""

    pid: int
    """Of its monitor; 0 where it does not answer."""
    memory_mib: int
    """Of the guest, as it booted."""
    balloon_mib: int | None
    """What the guest may use at present; None where the monitor does not say."""
    resident_bytes: int
    proportional_bytes: int
    """PSS: pages that several machines share count in part."""
    cpu_s: float


def connect(path: str) -> qmp.Qmp:
    """Return a conversation with the monitor whose control socket that is.

    The socket lies in a directory that the monitor may write: what stands there may be anything, and is told nothing
    before it has answered as a monitor does.

    Raises:
        UsageError: there is no socket.
        StepError: the monitor does not answer.
    """
    _socket_only(path)
    return qmp.connect(path, timeout_s=5.0)


def control_socket(vm: VmLaunch) -> str:
    """Return the path of a monitor's control socket: QMP of QEMU, the API of Firecracker."""
    return f"{vm.directory}/{API_SOCKET if vm.monitor == 'firecracker' else _QMP}"


def monitor_pid(vm: VmLaunch) -> int:
    """Return the process that listens on a machine's control socket (SO_PEERCRED); 0 where nobody does."""
    path = control_socket(vm)
    try:
        _socket_only(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(1)
            sock.connect(path)
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except (OSError, UsageError):
        return 0
    pid, uid, _ = struct.unpack("3i", credentials)
    return int(pid) if uid == (vm.monitor_uid or os.getuid()) else 0


def usage(vm: VmLaunch) -> Usage:
    """Return what a machine takes; figures are 0 where it is gone."""
    pid = monitor_pid(vm)
    rollup = _fields(f"/proc/{pid}/smaps_rollup") if pid else {}
    return Usage(
        pid=pid,
        memory_mib=vm.memory_mib,
        balloon_mib=_balloon(vm) if pid else None,
        resident_bytes=rollup.get("Rss", 0) * _KIB,
        proportional_bytes=rollup.get("Pss", 0) * _KIB,
        cpu_s=_cpu(pid) if pid else 0.0,
    )


def set_balloon(vm: VmLaunch, mib: int) -> None:
    """Say how much of its memory a guest may use. It gives the rest up as it can, and may take its time.

    Raises:
        UsageError: too little, or more than the machine has.
        StepError: the monitor does not obey.
    """
    if not _LEAST_MIB <= mib <= vm.memory_mib:
        raise UsageError(
            "balloon-size", f"a guest of {vm.memory_mib} MiB may have {_LEAST_MIB} to {vm.memory_mib} MiB",
            remedy="cloister vm balloon RUN 128M",
        )  # fmt: skip
    if vm.monitor == "firecracker":
        _socket_only(control_socket(vm))
        _firecracker(vm, lambda driver: driver.balloon(vm.memory_mib - mib))
        return
    with contextlib.closing(connect(control_socket(vm))) as monitor:
        monitor.call("balloon", value=mib * _MIB)


def _firecracker(vm: VmLaunch, ask: Callable[[FirecrackerDriver], Coroutine[Any, Any, T]]) -> T:
    """Ask a driver for something. What it imports costs 25 ms: only for such machines."""
    import asyncio

    from cloister.runs.vm_firecracker import driver_of

    return asyncio.run(ask(driver_of(vm)))


def _balloon(vm: VmLaunch) -> int | None:
    try:
        if vm.monitor == "firecracker":
            return max(0, vm.memory_mib - _firecracker(vm, lambda driver: driver.ballooned()))
        with contextlib.closing(connect(control_socket(vm))) as monitor:
            answer: Any = monitor.call("query-balloon")
    except (StepError, UsageError):
        return None
    actual = answer.get("actual") if isinstance(answer, dict) else None
    return actual // _MIB if isinstance(actual, int) else None


def _socket_only(path: str) -> None:
    try:
        right = stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        right = False
    if not right:
        raise UsageError("vm-not-alive", "the machine has no control socket", where=path, remedy="cloister vm list")


def _fields(path: str) -> dict[str, int]:
    found: dict[str, int] = {}
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, rest = line.partition(":")
            words = rest.split()
            if words and words[0].isdigit():
                found[name] = int(words[0])
    return found


def _cpu(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            words = file.read().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / _TICKS
    except (OSError, IndexError, ValueError):
        return 0.0
