"""Starting a transient unit, looking at what came of it, and ending it.

Properties are given to the manager as such and never in a unit file: it refuses a property that it does not know,
where a unit file is read with a warning. The answer of the manager alone is not believed either: what counts
is what /proc says of the first process. Which properties there are was decided before.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from typing import NamedTuple

from cloister.errors import RetryError, StepError, UnsupportedError
from cloister.host import unit_dbus
from cloister.host.programs import find
from cloister.host.systemd_manager import ManagerError
from cloister.host.systemd_units import UnitManager
from cloister.host.unit_limits import process_limits_wrong, seconds
from cloister.plan.unit import NETWORK_PREFIX, UNIT_PREFIX, UnitLaunch

START_S = 30.0
STOP_S = 20.0
_STDIO = frozenset({"StandardInput", "StandardOutput", "StandardError"})
_YES_NO = frozenset({"yes", "no"})
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_ECHOED = (
    *("User", "Group", "RootDirectory", "ProtectSystem", "KeyringMode", "DevicePolicy", "SystemCallArchitectures"),
    *("Slice", "CapabilityBoundingSet", "AmbientCapabilities", "ProtectProc", "KillMode", "OOMPolicy"),
)
"""Properties that the manager shows as they were given; of the rest those that are yes or no."""
_ENDED = (
    "LoadState",
    "ActiveState",
    "Job",
    "Result",
    "ExecMainCode",
    "ExecMainStatus",
    "MemoryPeak",
    "CPUUsageNSec",
    "InvocationID",
)


class Manager(NamedTuple):
    """The system's manager: its program and its version. Found once."""

    systemctl: str
    version: int


class Started(NamedTuple):
    """A unit that runs: its first process as a number and as a pidfd, and the manager's id for this life of it."""

    pid: int
    pidfd: int
    invocation: str


def find_manager() -> Manager:
    """Return the system's manager.

    Raises:
        UnsupportedError: this host was not started by systemd, or its program is not root's.
    """
    control = find("systemctl", "")
    if not control.path or not os.path.isdir("/run/systemd/system"):
        raise UnsupportedError("no-systemd", "runs under systemd need a host that was started by systemd")
    words = _run([control.path, "--version"]).stdout
    found = re.search(r"systemd (\d+)", words)
    if found is None:
        raise UnsupportedError("no-systemd", "systemctl does not tell its version", where=control.path)
    return Manager(control.path, int(found[1]))


def asked_of_manager(unit: UnitLaunch) -> tuple[tuple[str, str], ...]:
    """Return the properties that the manager gets: streams are descriptors, and a unit that failed is kept.

    Only until its end was asked for, for else its Result would not be known.
    """
    given = tuple(one for one in unit.properties if one[0] not in _STDIO and one[0] != "CollectMode")
    return (*given, ("CollectMode", "inactive"))


class Starting:
    """A unit that systemd is asked for; meanwhile other things can be done. `finish` or `abandon` must follow."""

    def __init__(  # noqa: PLR0913  # what a unit is started from
        self, bus: UnitManager, unit: UnitLaunch, argv: tuple[str, ...], channel: int, *,
        space: int = -1, shares: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Ask for the unit, with `channel` as the standard input of its first process and nothing as the others.

        Args:
            bus: a connection to the manager, its own from now on.
            unit: which one.
            argv: its first process.
            channel: its standard input.
            space: the network namespace to put it into; without, the service manager makes an empty one.
            shares: namespaces that it may have in common with the host.

        Raises:
            RetryError: systemd does not answer.
            StepError: a property is not understood.
        """
        self._unit, self._bus, self._shares = unit, bus, shares
        # The manager opens it while this process lives: the name leads to this very namespace.
        put = (("NetworkNamespacePath", f"/proc/{os.getpid()}/fd/{space}"),) if space >= 0 else ()
        try:
            body = unit_dbus.start_call(unit.unit, (*asked_of_manager(unit), *put), argv)
        except ValueError as error:
            raise StepError("unit-not-started", f"a property is not understood: {error}", where=unit.unit) from error
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._bus.ask_start(body, (channel, nothing, nothing))
        except ManagerError as error:
            raise _silent(error) from error
        finally:
            os.close(nothing)

    def finish(self) -> Started:
        """Return when the unit's first process was executed and is what was asked for.

        Raises:
            StepError: systemd refuses, or what came is not what was asked for; then nothing of it is left.
            RetryError: systemd does not answer.
        """
        try:
            return _verify(self._bus, self._unit, self._shares, self._await())
        except BaseException:
            stop(self._unit.unit)
            raise
        finally:
            self._bus.close()

    def abandon(self) -> None:
        """End the unit, once systemd has heard of it: what is still on its way to it could not be stopped."""
        try:
            with contextlib.suppress(ManagerError):
                self._bus.await_answer()
        finally:
            self._bus.close()
            stop(self._unit.unit)

    def _await(self) -> str:
        try:
            return self._bus.await_answer()
        except ManagerError as error:
            if not error.name:
                raise _silent(error) from error
            raise StepError(
                "unit-not-started", f"systemd refused the unit: {error}", where=self._unit.unit,
                remedy="journalctl -u cloister-hostd",
            ) from error  # fmt: skip


def stop(unit: str) -> dict[str, str]:
    """End a unit and everything in it; return what systemd says of its end, nothing where it forgot already.

    Raises:
        StepError: something of it still runs.
        RetryError: systemd does not answer.
    """
    last: dict[str, str] = {}
    silent: ManagerError | None = None
    until = time.monotonic() + STOP_S
    for number in range(_TRIES):
        try:
            with UnitManager(timeout_s=max(until - time.monotonic(), 1.0)) as bus:
                last = bus.show(unit, _ENDED) or last
                state = last.get("ActiveState", "")
                # A unit whose start has only been put in line is inactive too.
                idle = state in {"inactive", "failed"} and last.get("Job", "0") == "0"
                if last.get("LoadState") == "not-found" or idle:
                    if state == "failed":
                        bus.forget(unit)
                    return last
                bus.end(unit, kill=number > 0)
        except ManagerError as error:  # it may be slow to stop: then it is killed
            silent = error
    if silent:
        raise _silent(silent) from silent
    raise StepError("unit-not-stopped", "the unit does not end", where=unit, remedy=f"systemctl status {unit}")


_TRIES = 5


def show(unit: str, names: tuple[str, ...]) -> dict[str, str]:
    """Return properties of a unit as systemd shows them.

    Raises:
        RetryError: systemd does not answer.
    """
    with connect() as bus:
        try:
            return bus.show(unit, names)
        except ManagerError as error:
            raise _silent(error) from error


def living_units(manager: Manager) -> list[str]:
    """Return the names of all units of runs, and of their networks, that systemd knows."""
    patterns = [f"{prefix}*.service" for prefix in (UNIT_PREFIX, NETWORK_PREFIX)]
    words = [manager.systemctl, "list-units", "--all", "--plain", "--no-legend", "--full", *patterns]
    return [line.split()[0] for line in _run(words).stdout.splitlines() if line.strip()]


def connect() -> UnitManager:
    """Return a connection to the system's manager, which it answers when something is asked.

    Raises:
        RetryError: it does not take it.
    """
    try:
        return UnitManager(timeout_s=START_S)
    except ManagerError as error:
        raise _silent(error) from error


def _silent(error: ManagerError) -> RetryError:
    return RetryError("systemd-slow", f"systemd did not answer: {error}", remedy="systemctl is-system-running")


def _verify(bus: UnitManager, unit: UnitLaunch, shares: tuple[str, ...], job: str) -> Started:
    asked = dict(unit.properties)
    names = tuple(name for name in asked if name in _ECHOED or asked[name] in _YES_NO)
    try:
        # What was set stands from the answer on, so it is looked at while the unit starts.
        _compare(unit, names, bus.show(unit.unit, (*names, "Environment", "RuntimeMaxUSec")))
        # With Type=exec a unit has a job until its program was executed, with everything applied.
        bus.await_end(job)
        shown = bus.show(unit.unit, ("MainPID", "ActiveState", "InvocationID", "ControlGroup"))
    except ManagerError as error:
        raise _silent(error) from error
    pid = int(shown.get("MainPID", "0") or 0)
    if shown.get("ActiveState") != "active" or pid == 0:
        raise StepError(
            "unit-not-started", "the unit ended at once", where=unit.unit, remedy=f"journalctl -u {unit.unit}"
        )
    pidfd = os.pidfd_open(pid)  # before looking: a number that became another process's is not in the unit's cgroup
    try:
        check_process(pid, unit, shown.get("ControlGroup", ""), shares)
    except BaseException:
        os.close(pidfd)
        raise
    return Started(pid, pidfd, shown.get("InvocationID", ""))


def _compare(unit: UnitLaunch, names: tuple[str, ...], shown: dict[str, str]) -> None:
    """Hold what the manager says of a unit against what it was asked for.

    Not shown are names without a property of their own (PrivateUsersEx=): the shim's probes try those.
    """
    asked = dict(unit.properties)
    for name in names:
        if name in shown and shown[name] != asked[name]:
            raise _deviates(unit, f"{name} is {shown[name]!r} instead of {asked[name]!r}")
    if "RuntimeMaxSec" in asked and not _same_time(asked["RuntimeMaxSec"], shown.get("RuntimeMaxUSec", "")):
        raise _deviates(unit, f"it may run for {shown.get('RuntimeMaxUSec')!r}")
    if shown.get("Environment"):
        raise _deviates(unit, "it has an environment")


def check_process(pid: int, unit: UnitLaunch, control_group: str, shares: tuple[str, ...] = ()) -> None:
    """Hold what the kernel says of a unit's first process against the plan (proc(5)).

    `shares` are namespaces that it may have in common with the host.

    Raises:
        StepError: it runs as somebody else, has powers, no filter, or the host's network.
    """
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            groups = [line.rstrip("\n").split(":", 2)[2] for line in file]
        shared = [
            name
            for name in ("mnt", "ipc", "net")
            if name not in shares and _namespace(pid, name) == _namespace(1, name)
        ]
    except (OSError, ValueError) as error:
        raise _deviates(unit, "its first process is gone") from error
    own = "\t".join([str(unit.uid)] * 4)
    wanted = {"Uid": own, "Gid": own, "NoNewPrivs": "1", "Seccomp": "2"}
    wanted |= dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16)
    for name, value in wanted.items():
        if status.get(name) != value:
            raise _deviates(unit, f"its first process has {name} {status.get(name)!r}")
    if wrong := process_limits_wrong(unit.properties, pid):
        raise _deviates(unit, f"its first process has another {wrong}")
    if shared:
        raise _deviates(unit, f"it shares a namespace with the host: {shared[0]}")
    if not control_group.endswith(f"/{unit.unit}") or control_group not in groups:
        raise _deviates(unit, "its first process is not in its control group")


def _same_time(asked: str, shown: str) -> bool:
    """Compare a time span with what the manager says, which is a number of microseconds, the largest one for no end."""
    if asked == "infinity" or not shown.isdecimal():
        return asked == "infinity" and shown == str(_NO_END)
    return abs(seconds(asked) - int(shown) / 1e6) < _SAME_S


_SAME_S = 0.001
_NO_END = 2**64 - 1


def _namespace(pid: int, name: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{name}")


def _deviates(unit: UnitLaunch, what: str) -> StepError:
    return StepError("unit-deviates", f"systemd made something else of the unit: {what}", where=unit.unit,
                     remedy="nothing of it is left; please report it with the version of systemd")  # fmt: skip


def _run(words: list[str], *, limit_s: float = START_S, patient: bool = False) -> subprocess.CompletedProcess[str]:
    """Run one of systemd's programs; `patient` takes its silence for an answer."""
    try:
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=_ENVIRONMENT,
            cwd="/", timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        if patient:
            return subprocess.CompletedProcess(words, 1, "", "")
        raise RetryError("systemd-slow", "systemd did not answer in time", where=os.path.basename(words[0])) from error
