"""How long a start takes: cold from a shell, and warm from a program that keeps its sandbox."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import peers
from benchmarks.figures import Figure, Missing, compare, interleave
from benchmarks.report import Section
from benchmarks.world import World

from cloister.runs.sandbox import Sandbox

CLOISTER = "cloister run"
COLD_BROKER = "cloister run, no broker yet"
SLOW_ROUNDS = 6
COLD_TARGET, WARM_TARGET = 6.0, 1.5


def cold(world: World, rounds: int) -> Section:
    """`true` in a sandbox, from a shell that has nothing running but Cloister's broker."""
    cases: dict[str, Callable[[], float]] = {
        peers.BWRAP: world.timed([*peers.BWRAP_ARGV, "true"]),
        peers.BWRAP_ALL: world.timed([*peers.BWRAP_ALL_ARGV, "true"]),
        CLOISTER: world.timed(["cloister", "run", "shell", "--", "true"]),
    }
    missing: list[Missing] = []
    slow: dict[str, Callable[[], float]] = {COLD_BROKER: without_broker(world, cases[CLOISTER])}
    for peer in peers.field():
        case = world.timed([*peer.prefix, "true"]) if not peer.missing else None
        reason = peer.missing or (broken(case) if case else "")
        if reason or case is None:
            missing.append(Missing(peer.name, reason))
        else:
            slow[peer.name] = case
    samples = interleave(cases, rounds)
    base = cases[peers.BWRAP]
    paired = interleave({peers.BWRAP: base, **slow}, SLOW_ROUNDS)
    # The slow ones have fewer rounds, so they are compared with the base of their own rounds.
    fast = compare(samples, peers.BWRAP)
    rows: list[Figure | Missing] = [*fast, *compare(paired, peers.BWRAP)[1:], *missing]
    ratio = next(row.ratio_of_minima for row in fast if row.name == CLOISTER)
    return Section(
        "Cold start", "ms", rows,
        "A command, `true`, from fork to exit, in a git project. In that time Cloister also lays out the workspace, "
        "protects what the project's tools load (two dozen mounts), probes its own walls, and writes a receipt. Codex "
        "and srt protect a few such paths, bwrap and firejail none. A start passes through six processes, so on a "
        "machine with fewer idle cores than that its clock time grows more than the others': see the CPU time below.",
        f"`cloister run` ≤ {COLD_TARGET:g} x plain bwrap", said(ratio, COLD_TARGET),
    )  # fmt: skip


def cold_cpu(world: World, rounds: int) -> Section:
    """The same start in CPU time, and who uses it."""
    plain = world.charged([*peers.BWRAP_ARGV, "true"])
    run = world.charged(["cloister", "run", "shell", "--", "true"])
    run()
    names = (peers.BWRAP, CLOISTER, "of it: front door, bwrap, inner shim", "of it: broker")
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        client, broker = run()
        for name, value in zip(names, (plain()[0], client + broker, client, broker), strict=True):
            samples[name].append(value)
    return Section(
        "Cold start, CPU time", "ms", compare(samples, peers.BWRAP),
        "What all processes of a start use together, on whatever core; waiting for a busy machine is not in it. Of the "
        "broker's part a third is making and removing the placeholders that hold absent names (two dozen), the rest "
        "preparing, records and sockets. Of the other part most is bubblewrap's: its namespaces, and its own dozen "
        "mounts, for each of which it reads the mount table.",
    )  # fmt: skip


def without_broker(world: World, case: Callable[[], float]) -> Callable[[], float]:
    """Return the case with the broker ended before, outside the time measured."""

    def fresh() -> float:
        world.stop_broker()
        return case()

    return fresh


def broken(case: Callable[[], float]) -> str:
    """Try a case once; return why it cannot be measured here, or nothing."""
    try:
        case()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"does not work here ({error})"
    return ""


def warm(world: World, rounds: int) -> Section:
    """`true` in a sandbox, from a program: a kept sandbox against a new bubblewrap each time."""
    os.environ.update(world.environment)
    box = Sandbox("shell", directory=str(world.project))
    wrap = [*peers.BWRAP_ARGV, "true"]
    cases: dict[str, Callable[[], float]] = {
        "subprocess.run(bwrap)": clocked(lambda: subprocess.run(wrap, check=True, capture_output=True)),
        "Sandbox.run": clocked(lambda: box.run(["true"], check=True)),
    }
    library = Library(world)
    if not library.missing:
        cases["srt library"] = library.one
    try:
        samples = interleave(cases, rounds)
    finally:
        box.close()
        library.close()
    rows = compare(samples, "subprocess.run(bwrap)")
    ratio = rows[1].ratio_of_minima
    missing = [Missing("srt library", library.missing)] if library.missing else []
    return Section(
        "Warm start, from a program", "ms", [*rows, *missing],
        "The same command from a running program, output captured. Commands of one `Sandbox` share its run.",
        f"`Sandbox.run` ≤ {WARM_TARGET:g} x `subprocess.run` of bwrap", said(ratio, WARM_TARGET),
    )  # fmt: skip


def clocked(call: Callable[[], object]) -> Callable[[], float]:
    """Return a case that measures a call in milliseconds."""

    def case() -> float:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1000

    return case


class Library:
    """The library of srt in a Node.js of its own: a line asks for one command, a line tells how long it took."""

    def __init__(self, world: World) -> None:
        """Start it, where it is installed."""
        srt = peers.srt_command()
        self.missing = "" if srt else "sandbox-runtime is not installed"
        self._process: subprocess.Popen[str] | None = None
        if srt:
            module = Path(srt[1]).with_name("index.js")
            self._process = subprocess.Popen(
                [srt[0], str(Path(__file__).with_name("srt_warm.mjs")), str(module)], cwd=world.project,
                env=world.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, start_new_session=True,
            )  # fmt: skip
            if self._ask("start") != "ready":
                self.missing = "does not work here"

    def one(self) -> float:
        """Run one command; return milliseconds."""
        return float(self._ask("run"))

    def _ask(self, word: str) -> str:
        assert self._process
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """End it."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)  # its proxies and their socat too
            self._process.wait()


def said(ratio: float, target: float) -> str:
    """Say in words whether a target was met."""
    if ratio <= target:
        return f"Met: {ratio:.2g} x."
    return f"Missed by {(ratio / target - 1) * 100:.0f} %: {ratio:.2g} x."
