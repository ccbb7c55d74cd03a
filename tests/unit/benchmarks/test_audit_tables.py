"""The table of what being watched costs: ratios to nothing attached, and what is missing is named."""

from __future__ import annotations

from benchmarks.audit.kernel import BASE, PEERS, WALL, overhead_table
from benchmarks.figures import Missing
from benchmarks.report import Line

NAMES = ["getppid", "openat + close"]


def test_ratios_are_of_medians_and_tracers_are_measured_by_the_clock() -> None:
    """Each row is divided by nothing attached; a tracer's row is a ratio already, of clock time."""
    rows = {
        BASE: {"getppid": [100.0, 300.0, 200.0], "openat + close": [1000.0]},
        '`syscalls = "security"`': {"getppid": [400.0], "openat + close": [1500.0]},
        WALL: {"getppid": [90.0], "openat + close": [40.0]},
    }
    grid = overhead_table(rows, NAMES)
    found = {line.name: dict(line.values) for line in grid.lines if isinstance(line, Line)}

    assert found[f"{BASE}, µs of CPU time"] == {"getppid, x": 0.2, "openat + close, x": 1.0}
    assert found['`syscalls = "security"`'] == {"getppid, x": 2.0, "openat + close, x": 1.5}
    assert found[WALL] == {"getppid, x": 90.0, "openat + close, x": 40.0}
    assert grid.targets[0].outcome == "Missed: 1.50 x."


def test_what_is_not_installed_is_named() -> None:
    """A peer without figures stands in the table with its reason, and auditd says why it is never measured."""
    rows = {
        BASE: {"getppid": [100.0], "openat + close": [1000.0]},
        '`syscalls = "security"`': {"getppid": [200.0], "openat + close": [1300.0]},
    }
    grid = overhead_table(rows, NAMES)

    assert [line.name for line in grid.lines if isinstance(line, Missing)] == [*PEERS, WALL, "auditd"]
    assert grid.targets[0].outcome == "Met: 1.30 x."
