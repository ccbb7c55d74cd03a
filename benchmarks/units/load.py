"""What units cost beside time: memory of the daemons and of a run, and many runs at once."""

from __future__ import annotations

import time

from benchmarks.report import Grid, Line, Target
from benchmarks.starts import said
from benchmarks.units.machine import Rig
from benchmarks.units.starts import run

RUNS, CROWD = 20, 100
TARGET_MIB = 5.0
IDLE_S = 75.0
"""hostd ends after 60 s without a request."""
_SETTLE_S = 2.0
_SIZE = "MiB"


def memory(rig: Rig, *, patient: bool) -> Grid:
    """The daemons with no run, one run more, and hostd when nobody asks."""
    rig.stop(rig.detach(60))
    time.sleep(_SETTLE_S)
    before = rig.ask("sizes")
    living = [rig.detach(600) for _ in range(RUNS)]
    time.sleep(_SETTLE_S)
    during = rig.ask("sizes")
    for one in living:
        rig.stop(one)
    each = (during["all"] - before["all"]) / RUNS
    lines = [
        Line("hostd, just asked", {_SIZE: before.get("hostd", 0.0)}),
        Line("proxyd, no run", {_SIZE: before.get("proxyd", 0.0)}),
        Line("the user's broker, no run", {_SIZE: before.get("broker", 0.0)}),
        Line("one run more, everything", {_SIZE: each}),
        Line("of it in proxyd", {_SIZE: (during["proxyd"] - before["proxyd"]) / RUNS}),
        Line("of it in the user's broker", {_SIZE: (during["broker"] - before["broker"]) / RUNS}),
    ]
    if patient:
        time.sleep(IDLE_S)
        lines.insert(1, Line("hostd, a minute later", {_SIZE: rig.ask("sizes").get("hostd", 0.0)}))
    return Grid(
        f"Units: memory, {rig.name}", (_SIZE,), lines,
        f"Proportional set size (`smaps_rollup`) of all processes of the machine, read by root; {RUNS} runs of "
        "`sleep` less none, by their number: the outer half, the shim, `sleep`, and what brokers and systemd keep.",
        (Target(f"one run more ≤ {TARGET_MIB:g} MiB", said(each, TARGET_MIB).replace(" x", " MiB")),),
    )  # fmt: skip


def crowd(rig: Rig) -> Grid:
    """Many runs at once."""
    told = rig.ask("crowd", argv=run(), count=CROWD)
    failed = told["failed"]
    first = f" The first said: {failed[0].splitlines()[0]}" if failed else ""
    return Grid(
        f"Units: {CROWD} at once, {rig.name}", ("completed", "s in all", "ms each"),
        [Line("cloister run, one user", {"completed": CROWD - len(failed), "s in all": told["seconds"],
                                         "ms each": told["seconds"] / CROWD * 1000})],
        f"{CROWD} times `cloister run … -- true` started together by one user in one project.",
        (Target("all complete", "Met." if not failed else f"Missed: {len(failed)} did not.{first}"),),
    )  # fmt: skip
