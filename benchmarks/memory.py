"""What one more idle run adds to the memory of the machine: everything of this user, before and with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import peers
from benchmarks.figures import Figure, Missing
from benchmarks.report import Section
from benchmarks.world import World

TARGET_MIB = 5.0
PAGE = os.sysconf("SC_PAGE_SIZE")
MANY = (1, 10, 50)
SETTLE_S = 20.0


def memory(world: World) -> Section:
    """Idle memory of `sleep` in each sandbox, per run."""
    subprocess.run(["cloister", "run", "shell", "--", "true"], cwd=world.project, env=world.environment, check=True)
    cloister = ["cloister", "run", "shell", "--", "sleep", "1000"]
    values: dict[str, float] = {"plain bwrap": added(world, [*peers.BWRAP_ARGV, "sleep", "1000"], 5)}
    for count in MANY:
        values[f"cloister, {count} run{'s' * (count > 1)}"] = added(world, cloister, count)
    missing = []
    for peer in peers.field():
        if peer.missing:
            missing.append(Missing(peer.name, peer.missing))
            continue
        values[peer.name] = added(world, [*peer.prefix, "sleep", "1000"], 2)
    base = values["plain bwrap"]
    rows = [Figure(name, mib, mib, mib / base, mib / base, 1) for name, mib in values.items()]
    most = max(mib for name, mib in values.items() if name.startswith("cloister"))
    verdict = "Met" if most <= TARGET_MIB else "Missed"
    return Section(
        "Idle memory of one more run", "MiB", [*rows, *missing],
        "All processes of the user with the runs, less those before, by the number of runs: the broker's share is in "
        "it, and the payload (`sleep`). Proportional set size (`smaps_rollup`); of processes that forbid looking, as "
        "ours do, the whole resident set counts, which is more. setuid programs (firejail) are read the same way.",
        f"≤ {TARGET_MIB:g} MiB", f"{verdict}: {most:.2g} MiB at most.",
    )  # fmt: skip


def added(world: World, argv: Sequence[str], count: int) -> float:
    """Return MiB added per run while `count` of them idle."""
    before = total()
    others = set(sleepers())
    processes = [
        subprocess.Popen(
            argv, cwd=world.project, env=world.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )
        for _ in range(count)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + SETTLE_S
        while len(fresh := set(sleepers()) - others) < count:
            if time.monotonic() > deadline:
                ended = [process.returncode for process in processes if process.poll() is not None]
                raise TimeoutError(f"{argv}: {len(fresh)} of {count} came up; exit codes {ended}")
            time.sleep(0.05)
        time.sleep(0.5)
        return (total() - before) / count / 2**20
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        end_sleepers(others)


def mine() -> list[Path]:
    """Return the processes of this user (real id: firejail's effective one is root) below /proc, but this one."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            status = (folder / "status").read_text()
            if f"\nUid:\t{os.getuid()}\t" in status:
                found.append(folder)
    return found


def command_of(process: Path) -> str:
    """Return the command line of a process."""
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_text(errors="replace").replace("\0", " ").strip() or process.name
    return process.name


def total() -> int:
    """Return the bytes that all processes of this user take."""
    return sum(map(size, mine()))


def size(process: Path) -> int:
    """Return the proportional set size of a process, or all that is resident where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (process / "smaps_rollup").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Pss:"))) * 1024
    with contextlib.suppress(OSError):
        return int((process / "statm").read_text().split()[1]) * PAGE
    return 0


def sleepers() -> list[int]:
    """Return the payloads that run now."""
    found = []
    for process in mine():
        with contextlib.suppress(OSError):
            if (process / "comm").read_text() == "sleep\n":
                found.append(int(process.name))
    return found


def end_sleepers(others: set[int]) -> None:
    """End payloads that outlived their sandbox (plain bwrap's do), and wait for them: they count as memory."""
    for pid in set(sleepers()) - others:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + SETTLE_S
    while set(sleepers()) - others and time.monotonic() < deadline:
        time.sleep(0.05)
