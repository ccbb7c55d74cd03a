"""What a run may not leave behind: processes, mounts, files in the runtime folder. Looks only; ends nothing.

Compares two looks at the machine, so it means something only under a user id of which the tests
are the only user (`make test` sees to that), and not with tests that run side by side.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 5.0
"""How long processes that are already dying may take: the kernel tears namespaces down asynchronously."""


@dataclass(frozen=True)
class Look:
    """What was there at one moment."""

    processes: dict[int, str]
    mounts: frozenset[str]
    runtime: frozenset[str]


def take() -> Look:
    """Look at this user's processes, this namespace's mounts, and XDG_RUNTIME_DIR but for what systemd keeps there."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return Look(
        processes=dict(_own_processes()),
        mounts=frozenset(line.split()[4] for line in mounts),
        runtime=frozenset(str(path) for path in runtime.rglob("*") if runtime / "systemd" not in path.parents),
    )


def check(before: Look) -> None:
    """Raise AssertionError that names what is there now and was not before."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        now = take()
        left = [f"process {pid}: {name}" for pid, name in now.processes.items() if pid not in before.processes]
        left += [f"mount {path}" for path in sorted(now.mounts - before.mounts)]
        left += [f"file {path}" for path in sorted(now.runtime - before.runtime)]
        if not left:
            return
        if time.monotonic() > deadline:
            raise AssertionError("left behind:\n  " + "\n  ".join(left))
        time.sleep(0.05)


def _own_processes() -> list[tuple[int, str]]:
    """Return pid and command line of every process of this user.

    A zombie counts when its parent should have collected it. One that came to PID 1 is over, and some of those that
    are PID 1 in a container or a small virtual machine take seconds to collect it.
    """
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # Not the owner of the folder: that is root's for processes that are not dumpable (proc(5)).
            status = (folder / "status").read_text(encoding="utf-8", errors="replace")
            if re.search(rf"^Uid:\t{os.getuid()}\t", status, re.MULTILINE):
                state = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
                zombie = state["State"].startswith(("Z", "X"))
                if zombie and state["PPid"] == "1":
                    continue
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                words = f"{state['Name']} (a zombie of {state['PPid']})" if zombie else line[:200]
                found.append((int(folder.name), words))
        except OSError:
            continue  # it ended while we looked
    return found
