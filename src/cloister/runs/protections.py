"""Protected paths of a workspace while a run lasts: noticing that the host replaces one, looking back at the end.

What follows from a replaced file is for the run: this tells whose it was. How mounts protect is
decided by `isolation/workspace.py`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from cloister.host import tripwires
from cloister.host.watch import Watch
from cloister.plan.workspace import WorkspaceLayout
from cloister.policy.protected import protected_names

Identity = tuple[int, int]
"""Device and inode."""


class Protections:
    """The watched paths of all runs of one broker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_touched: Callable[[str], None]) -> None:
        """Watch nothing yet; `on_touched` gets the id of a run of whose protected paths one was touched."""
        self._loop = loop
        self._on_touched = on_touched
        self._watch: Watch | None = None

    def add(self, run: str, layout: WorkspaceLayout) -> str:
        """Watch what a run has mounted read-only; return a warning where that is not possible for all of it."""
        try:
            if self._watch is None:
                self._watch = Watch()
                self._loop.add_reader(self._watch.descriptor, self._touched)
            missed = self._watch.add(run, (mount.source for mount in layout.mounts if mount.op == "ro"))
        except OSError:
            missed = 1
        return f"{missed} protected paths cannot be watched for replacement" if missed else ""

    def remove(self, run: str) -> None:
        """Forget a run."""
        if self._watch:
            self._watch.remove(run)

    def _touched(self) -> None:
        for run in self._watch.touched() if self._watch else ():
            self._on_touched(run)


def standing(layout: WorkspaceLayout) -> dict[str, Identity | None]:
    """Return what is at every protected path now: device and inode, or None where nothing is."""
    return {mount.source: _identity(mount.source) for mount in layout.mounts if mount.op == "ro"}


def replaced(before: dict[str, Identity | None]) -> list[str]:
    """Return one sentence for each path at which something else is than `standing` saw."""
    return [f"{_shown(path)}: not what was mounted" for path, was in before.items() if _identity(path) != was]


def look_after(layout: WorkspaceLayout, started: float) -> tuple[str, ...]:
    """Return what the person should look at before using tools in the workspace again.

    Args:
        layout: the workspace as it was shown.
        started: when the run began, in seconds since the epoch.
    """
    names = [entry.name for entry in protected_names()]
    report = tripwires.look_after(layout, names, since_ns=int(started * 1e9))
    shown = [f"{_shown(finding.path)}: {finding.what} [workspace-changed]" for finding in report.findings]
    return tuple(shown if report.complete else [*shown, "the workspace is too large to be looked at whole"])


def _identity(path: str) -> Identity | None:
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return (info.st_dev, info.st_ino)


def _shown(path: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in path)
