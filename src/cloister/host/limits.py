"""Putting a sandbox under the limits of a whole run: a cgroup of ours, or a scope of the systemd manager.

Only the sandbox's first process is moved, before the agent is started: everything in there
descends from it, and the client outside stays where the person started it, so that ending the
cgroup never costs the exit code. Limits count only once they are read back from the kernel
(systemd leaves out, without a word, what its controllers cannot do).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from cloister.errors import StepError
from cloister.host.mounts import cgroup_of
from cloister.host.sandbox_pid import find_sandbox_pid
from cloister.host.systemd_manager import Manager, ManagerError, Value
from cloister.plan.steps import LimitCgroup, LimitScope

_UNKNOWN_PROPERTY = ("org.freedesktop.DBus.Error.PropertyReadOnly", "org.freedesktop.DBus.Error.UnknownProperty")
_REMEDY = "cloister doctor"


def make(step: LimitCgroup) -> None:
    """Make the cgroup and set its limits before anything is in it (cgroup-v2.rst).

    Raises:
        OSError: the kernel refuses.
    """
    os.mkdir(step.path)
    for name, value in step.values().items():
        _write(f"{step.path}/{name}", value)
    if step.memory_bytes is not None and os.path.exists(f"{step.path}/memory.swap.max"):
        _write(f"{step.path}/memory.swap.max", "0")


def enter(step: LimitCgroup | LimitScope, outer_pid: int) -> str:
    """Move the first process of the sandbox below `outer_pid`, and see that the limits hold; return the cgroup.

    May block for seconds where the systemd manager is slow: not for an event loop.

    Raises:
        StepError: the process is not limited, and must not be told to go on.
    """
    pid = find_sandbox_pid(outer_pid)
    if not pid:
        raise StepError("limits-failed", "the sandbox's first process is not found", remedy=_REMEDY)
    try:
        match step:
            case LimitCgroup(path=path):
                _write(f"{path}/cgroup.procs", str(pid))
                name = os.path.basename(path)
            case LimitScope(unit=name):
                _start_scope(step, pid)
        return _verified(step, pid, name)
    except OSError as error:
        where = str(error.filename or "")
        raise StepError("limits-failed", f"{error.strerror}", where=where, remedy=_REMEDY) from error
    except ManagerError as error:
        raise StepError("limits-failed", str(error), where=error.name, remedy=_REMEDY) from error


def reached(path: str, pids_path: str = "", *, memory_file: str = "memory.events") -> tuple[str, ...]:
    """Return in words which limits of a cgroup were run into so far.

    Args:
        path: its directory; that of the memory controller in cgroup v1.
        pids_path: that of the pids controller, where it is another one.
        memory_file: who counts `oom_kill`: memory.events, memory.oom_control in v1.
    """
    killed, refused = _count(f"{path}/{memory_file}", "oom_kill"), _count(f"{pids_path or path}/pids.events", "max")
    words = []
    if killed:
        words.append(f"memory_max was reached: the kernel ended {_many(killed, 'process', 'processes')}")
    if refused:
        words.append(f"tasks_max was reached: {_many(refused, 'start', 'starts')} of processes or threads refused")
    return tuple(words)


def leave(step: LimitCgroup | LimitScope) -> None:
    """End what is left under the limits and remove them; nothing there is fine.

    Raises:
        OSError: the systemd manager refuses, or does not answer.
    """
    match step:
        case LimitCgroup(path=path):
            _remove(path)
        case LimitScope(unit=unit):
            try:
                with Manager(timeout_s=2.0) as manager:
                    manager.stop(unit)
            except ManagerError as error:
                raise OSError(str(error)) from error


def _start_scope(step: LimitScope, pid: int) -> None:
    """Start the scope; one that outlives its processes is collected, and stopping it kills at once."""
    properties: dict[str, Value] = {
        "Description": ("s", "Cloister run"),
        "CollectMode": ("s", "inactive-or-failed"),
        "KillSignal": ("i", signal.SIGKILL),
    }
    if step.memory_bytes is not None:
        properties |= {"MemoryMax": ("t", step.memory_bytes), "MemorySwapMax": ("t", 0)}
    if step.tasks is not None:
        properties["TasksMax"] = ("t", step.tasks)
    if step.cpu_quota_us is not None:
        properties["CPUQuotaPerSecUSec"] = ("t", step.cpu_quota_us * 10)
    # systemd 253 and later would end the whole scope with the first process that the kernel ends; older ones do not
    # know the property of scopes, and leave the rest alone.
    for wanted in ({**properties, "OOMPolicy": ("s", "continue")}, properties):
        try:
            with Manager() as manager:
                manager.start_scope(step.unit, pid, wanted)
        except ManagerError as error:
            if error.name not in _UNKNOWN_PROPERTY or wanted is properties:
                raise
        else:
            return


def _verified(step: LimitCgroup | LimitScope, pid: int, name: str) -> str:
    """Return the cgroup of `pid`, after reading back that it is the wanted one with the wanted limits."""
    path = cgroup_of(_read("/proc/self/mountinfo"), _read(f"/proc/{pid}/cgroup")).path
    if os.path.basename(path) != name:
        raise StepError("limits-failed", "the sandbox is not in its cgroup", where=path, remedy=_REMEDY)
    for file, wanted in step.values().items():
        found = _read(f"{path}/{file}")
        if found != wanted and not (file == "memory.max" and _rounded_down(found, int(wanted))):
            message = f"{file} is {found or 'not there'}, where {wanted} was asked for"
            raise StepError("limits-failed", message, where=path, remedy=_REMEDY)
    if step.memory_bytes is not None and _read(f"{path}/memory.swap.max") not in {"", "0"}:
        raise StepError("limits-failed", "memory could still be swapped out", where=path, remedy=_REMEDY)
    return path


def _rounded_down(found: str, wanted: int) -> bool:
    """Return whether the kernel has taken the number of bytes, in whole pages."""
    return found.isdecimal() and wanted - os.sysconf("SC_PAGE_SIZE") < int(found) <= wanted


def _remove(path: str) -> None:
    """Kill what is left in the cgroup, then remove it (cgroup.kill: Linux 5.14)."""
    if not os.path.isdir(path):
        return
    with contextlib.suppress(OSError):
        _write(f"{path}/cgroup.kill", "1")
    for _ in range(50):
        with contextlib.suppress(OSError):
            os.rmdir(path)
            return
        with contextlib.suppress(OSError, ValueError):
            for line in _read(f"{path}/cgroup.procs").splitlines():
                os.kill(int(line), signal.SIGKILL)
        time.sleep(0.02)


def _count(path: str, key: str) -> int:
    """Return one counter of a flat keyed file; 0 where it is not there."""
    return next((int(line.split()[1]) for line in _read(path).splitlines() if line.startswith(f"{key} ")), 0)


def _many(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
