"""What hostd has written down of living runs, and undoing one from that alone.

A record is there before the first step of its run. Whoever starts a run holds a lock meanwhile, which the kernel
takes back when that process dies in any way: a record whose lock is free is either that of a unit which runs,
or left over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from typing import Literal, NamedTuple

import msgspec

from cloister.host import unit_start, unit_state
from cloister.plan.steps import Plan
from cloister.plan.unit import NETWORK_PREFIX, STATE, UNIT_PREFIX

DIRECTORY = f"{STATE}/hostd/runs"
_PAUSE_S, _PATIENCE_S = 0.02, 30.0
_RUN = re.compile(r"[0-9a-z][0-9a-z-]{0,63}")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    run: str
    unit: str
    state: Literal["starting", "started"]
    caller: str
    caller_uid: int
    account: str
    root: str
    workspace: str
    invocation: str = ""
    carried: int = 0
    """Bytes of what the user carries in; they lie in memory while the run lasts."""
    plan: Plan


class Lock:
    """The lock of a run while it is being started or undone. The kernel frees it with the process."""

    def __init__(self, run: str, directory: str = DIRECTORY, wait_s: float = 0) -> None:
        """Take it, waiting for so long.

        Raises:
            BlockingIOError: somebody has it.
        """
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._path = f"{directory}/{run}.lock"
        until = time.monotonic() + wait_s
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._descriptor)
                if time.monotonic() >= until:
                    raise
                time.sleep(_PAUSE_S)
                continue
            if self._is_the_file():
                return
            os.close(self._descriptor)  # who had it removed it when done

    def release(self, *, remove: bool = False) -> None:
        """Free it."""
        if remove:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        os.close(self._descriptor)

    def _is_the_file(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


def write(record: Record, directory: str = DIRECTORY) -> None:
    """Write a record as a whole."""
    path = f"{directory}/{record.run}.json"
    with open(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(record))
    os.rename(f"{path}.new", path)


def read(run: str, directory: str = DIRECTORY) -> Record | None:
    """Return a record, or None where there is none that can be read."""
    try:
        with open(f"{directory}/{run}.json", "rb") as file:
            return msgspec.json.decode(file.read(), type=Record)
    except (OSError, msgspec.DecodeError, ValueError):
        return None


def recorded(directory: str = DIRECTORY) -> list[str]:
    """Return the ids of all recorded runs, also of those whose record cannot be read."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    found = {name.partition(".")[0] for name in names}
    return sorted(run for run in found if _RUN.fullmatch(run))


class Living(NamedTuple):
    """What a user has under way: runs, and bytes that they carry in."""

    runs: int
    carried: int


def living_of(uid: int, directory: str = DIRECTORY) -> Living:
    """Return what is recorded of a user."""
    found = [part for run in recorded(directory) if (part := _part(run, directory)).caller_uid == uid]
    return Living(len(found), sum(part.carried for part in found))


class _Part(msgspec.Struct):
    caller_uid: int = -1
    carried: int = 0


def _part(run: str, directory: str) -> _Part:
    try:
        with open(f"{directory}/{run}.json", "rb") as file:
            return msgspec.json.decode(file.read(), type=_Part)
    except (OSError, msgspec.DecodeError, ValueError):
        return _Part()


def is_run(text: str) -> bool:
    """Whether a text may be the id of a run."""
    return _RUN.fullmatch(text) is not None


def undo(run: str, directory: str = DIRECTORY) -> dict[str, str]:
    """Stop the unit of a run, wait for its end, and remove what was made for it. Its mounts end with it.

    Raises:
        BlockingIOError: it is being started or undone by another process.
        StepError: the unit does not end; the record stays.
    """
    return _undo_locked(run, Lock(run, directory, _PATIENCE_S), directory)


def _undo_locked(run: str, lock: Lock, directory: str) -> dict[str, str]:
    done = False
    try:
        ended = stop_units(run, read(run, directory))
        remove(run, directory)
        done = True
        return ended
    finally:
        lock.release(remove=done)


def stop_units(run: str, record: Record | None = None) -> dict[str, str]:
    """End the unit of a run, then that of its network; return what systemd says of the first one's end.

    Without a record it is not known whether there is a network.

    Raises:
        StepError: something of them still runs.
        RetryError: systemd does not answer.
    """
    ended = unit_start.stop(f"{UNIT_PREFIX}{run}.service")
    if record is None or record.plan.launch.pasta:
        unit_start.stop(f"{NETWORK_PREFIX}{run}.service")
    return ended


def remove(run: str, directory: str = DIRECTORY) -> None:
    """Remove a run's own directory and its record, in this order: without the record nobody would look for the rest."""
    unit_state.remove_run_directory(run)
    for name in (f"{run}.json.new", f"{run}.json"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}/{name}")


def recover(manager: unit_start.Manager, living: frozenset[str] | None = None, directory: str = DIRECTORY) -> list[str]:
    """Undo what no living run wants; return the ids.

    With `living` these alone are wanted (the system's broker says so when it starts). Without, a run is wanted when its
    start was finished and its unit is active. A run that is being started is left alone: its process lives.
    """
    undone = []
    names = (unit.removesuffix(".service") for unit in unit_start.living_units(manager))
    units = {name.removeprefix(UNIT_PREFIX).removeprefix(NETWORK_PREFIX) for name in names}
    for run in sorted({*recorded(directory), *filter(is_run, units)}):
        if living is not None and run in living:
            continue
        try:
            lock = Lock(run, directory)
        except BlockingIOError:
            continue
        record = read(run, directory)  # only now: until it had the lock, its start may have been under way
        if living is None and record is not None and record.state == "started" and _active(record.unit):
            lock.release(remove=True)
            continue
        _undo_locked(run, lock, directory)
        undone.append(run)
    return undone


def _active(unit: str) -> bool:
    return unit_start.show(unit, ("ActiveState",)).get("ActiveState") in {
        "active",
        "activating",
        "deactivating",
    }
