"""What may be removed: old records, agent state of vanished projects, old copies of `/etc`, leftovers of dead brokers.

`survey` looks and decides, `remove` acts, so that a dry run and a real one cannot differ. Never
taken: living runs, changes in overlays that nobody has applied or discarded, and state whose
project cannot be told.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from cloister.host import removal, vm_template
from cloister.runs import vm_workspace
from cloister.runs.compile import PROJECT_RECORD
from cloister.runs.paths import Paths
from cloister.runs.store import Store

Kind = Literal["record", "overlay", "state", "etc", "runtime", "template", "snapshot"]
_PARTIAL_S = 3600.0
"""An assembly of `/etc` takes milliseconds: one that is this old was killed."""


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """One directory or file that may go."""

    kind: Kind
    path: str
    bytes: int
    why: str


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What decides."""

    now: float
    older_than_s: float
    living: frozenset[str]
    etc_in_use: str
    """The copy of `/etc` that the next start would use."""
    overlays: bool = False
    """Take pending changes as well."""


def survey(paths: Paths, rules: Rules) -> list[Leftover]:
    """Return everything that may go, without touching it."""
    return [
        *_records(paths, rules),
        *_states(paths, rules),
        *_copies_of_etc(paths, rules),
        *_runtime(paths, rules),
        *_machines(paths, rules),
    ]


def remove(leftover: Leftover) -> bool:
    """Remove one thing; return whether it is gone. Links are removed, never followed."""
    return removal.sweep(leftover.path)


def _records(paths: Paths, rules: Rules) -> Iterator[Leftover]:
    store = Store(paths.runs)
    for run in store.ids():
        record = store.record(run)
        if run in rules.living or record is None or record.status != "finished":
            continue
        age = rules.now - (record.finished or 0)
        if age < rules.older_than_s:
            continue
        path = f"{paths.runs}/{run}"
        pending = Path(f"{path}/overlay").is_dir() or vm_workspace.left(path)
        if pending and not rules.overlays:
            continue
        why = f"{record.agent}, over for {age / 86400:.0f} days"
        kind: Kind = "overlay" if pending else "record"
        yield Leftover(
            kind=kind, path=path, bytes=_size(path), why=why + (", changes never applied" if pending else "")
        )


def _machines(paths: Paths, rules: Rules) -> Iterator[Leftover]:
    """Yield templates that nobody started from for as long, and what makers that were killed have left.

    Snapshots stay: whoever has named one decides about it.
    """
    kinds: tuple[tuple[Kind, str], ...] = (("template", paths.templates), ("snapshot", paths.snapshots))
    for kind, root in kinds:
        for path in sorted(Path(root).glob("*")):
            being_made = path.name.startswith(vm_template.MAKING)
            age = rules.now - path.lstat().st_mtime
            if being_made and vm_template.abandoned(str(path)):
                yield Leftover(kind=kind, path=str(path), bytes=_size(str(path)), why="its maker was killed")
            elif kind == "template" and not being_made and age >= rules.older_than_s:
                why = f"nothing has started from it for {age / 86400:.0f} days"
                yield Leftover(kind=kind, path=str(path), bytes=_size(str(path)), why=why)


def _states(paths: Paths, rules: Rules) -> Iterator[Leftover]:
    """Yield state whose project is gone and that was not used for as long: a disk may only be unplugged."""
    in_use = {f"{paths.agents}/{agent}" for agent in _agents_of_living(paths, rules)}
    for state in sorted(Path(paths.agents).glob("*/*")):
        anchor = _anchor(state / PROJECT_RECORD)
        if not anchor or os.path.lexists(anchor) or str(state.parent) in in_use:
            continue
        if rules.now - _newest(state) >= rules.older_than_s:
            why = f"history of {state.parent.name} for {anchor}, which is gone"
            yield Leftover(kind="state", path=str(state), bytes=_size(str(state)), why=why)


def _agents_of_living(paths: Paths, rules: Rules) -> Iterator[str]:
    store = Store(paths.runs)
    for run in rules.living:
        plan = store.plan(run)
        if plan:
            yield plan.agent


def _anchor(record: Path) -> str:
    """Return the path a project stands or falls with: its git directory where it has one."""
    try:
        found = json.loads(record.read_text("utf-8"))
        return str(found["git"] or found["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _copies_of_etc(paths: Paths, rules: Rules) -> Iterator[Leftover]:
    used = {rules.etc_in_use, *_etc_of_unfinished(paths)}
    for copy in sorted(Path(paths.etc).glob("*")):
        whole = "." not in copy.name
        age = rules.now - _mtime(copy)
        if str(copy) in used or (not whole and age < _PARTIAL_S):
            continue
        why = "made before the host's /etc changed" if whole else "its making was interrupted"
        yield Leftover(kind="etc", path=str(copy), bytes=_size(str(copy)), why=why)


def _etc_of_unfinished(paths: Paths) -> Iterator[str]:
    store = Store(paths.runs)
    for run in store.ids():
        record = store.record(run)
        plan = store.plan(run) if record is None or record.status != "finished" else None
        argv = plan.launch.argv if plan else ()
        yield from (argv[index - 1] for index, word in enumerate(argv) if word == "/etc")


def _runtime(paths: Paths, rules: Rules) -> Iterator[Leftover]:
    for folder in sorted(Path(paths.runtime, "runs").glob("*")):
        if folder.name not in rules.living:
            yield Leftover(kind="runtime", path=str(folder), bytes=_size(str(folder)), why="its run is over")
    socket = Path(paths.broker_socket)
    if os.path.lexists(socket) and _broker_is_dead(paths.runtime):
        yield Leftover(kind="runtime", path=str(socket), bytes=0, why="its broker is dead")


def _broker_is_dead(runtime: str) -> bool:
    """Tell by the lock, which a broker holds for its whole life, also while it starts."""
    try:
        with Path(runtime, "broker.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _walk(path: str) -> Iterator[os.stat_result]:
    """Look at everything below a directory, as far as a path can be long; depth costs no stack (`os.walk` does)."""
    waiting = [path]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    info = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(info.st_mode):
                        waiting.append(entry.path)
                    yield info


def _size(path: str) -> int:
    """Return what removing would free: allocated blocks (stat(2) counts them in units of 512 bytes)."""
    return sum(info.st_blocks * 512 for info in _walk(path))


def _newest(path: Path) -> float:
    return max((info.st_mtime for info in _walk(str(path))), default=_mtime(path))


def _mtime(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
