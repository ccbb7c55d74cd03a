"""Limits of units, attacked: memory, processes and processor time of a whole run, read back from the kernel.

Where a machine has no controllers nothing starts, which is tested as well. All are there on a host with cgroup v2 only
and systemd as its PID 1: tests/vm runs this file on such machines, with systemd 252 and 257.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from runs_rig import Rig

from support.machines import HERE_IT_IS, Machine

pytestmark = pytest.mark.slow

POLICY = """\
schema = 1

[agents.bound]
isolation = "unit"
command = ["/bin/sh"]
limits = { memory_max = "96M", tasks_max = 40, cpu_quota = "50%", enforce = "cgroup" }

[agents.free]
isolation = "unit"
command = ["/bin/sh"]

[users.alice]
agents = ["bound", "free"]
roots = ["~/p"]
"""
HOG = (
    'python3 -c \'import sys, time; kept = b"x" * (int(sys.argv[1]) << 20);'
    'time.sleep(int((sys.argv[2:] or [0])[0])); print("alive")\''
)
BOMB = "i=0; while [ $i -lt 80 ]; do sleep 20 & i=$((i+1)); done; echo started; kill $(jobs -p); wait"
BURN = """python3 -c '
import os, time
children, began = [], time.monotonic()
for _ in range(2):
    child = os.fork()
    if child == 0:
        while time.monotonic() - began < 4: pass
        os._exit(0)
    children.append(child)
for child in children: os.waitpid(child, 0)
spent = os.times()
print((spent.children_user + spent.children_system) / (time.monotonic() - began))'
"""


@pytest.fixture(scope="module")
def rig(suite: str, layers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One installed machine for the tests of this file."""
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"limits-{suite}")) as machine:
        yield Rig(machine, POLICY)


def _held(rig: Rig) -> bool:
    """Say whether this machine can hold all limits; where not, see that nothing starts."""
    if {"memory", "pids", "cpu"} <= rig.machine.controllers:
        return True
    assert not HERE_IT_IS, "this machine was to have all controllers"
    done = rig.sh("echo started", agent="bound")
    assert "limits-not-in-force" in done.stderr
    assert "started" not in done.stdout
    return False


def test_the_kernel_has_what_was_asked_for(rig: Rig) -> None:
    """memory.max, memory.swap.max, pids.max and cpu.max of the unit's cgroup are the policy's; the receipt says so."""
    if not _held(rig):
        return
    run = rig.detach("exec sleep 60", agent="bound")
    place = rig.machine.show(f"cloister-run-{run}.service", "ControlGroup")
    names = ("memory.max", "memory.swap.max", "pids.max", "cpu.max")
    values = [] if rig.machine.hybrid else [rig.machine.read(f"/sys/fs/cgroup{place}/{name}").strip() for name in names]
    rig.cloister("stop", run)
    rig.clean()
    said = rig.receipt(run)

    assert values == ([] if rig.machine.hybrid else [str(96 << 20), "0", "40", "50000 100000"])
    assert {"memory_max 96M: unit (MemoryMax=), no swap", "tasks_max 40: unit (TasksMax=)",
            "cpu_quota 50%: unit (CPUQuota=)"} <= set(said["limits"])  # fmt: skip


def test_a_hog_is_killed(rig: Rig) -> None:
    """More than the limit is not to be had, by one process or by two together; what fits lives."""
    if not _held(rig):
        return
    one = rig.sh(f"{HOG} 200", agent="bound")
    said = rig.receipt()
    two = rig.sh(f"{HOG} 60 5 & {HOG} 60 5; wait", agent="bound")
    fits = rig.sh(f"{HOG} 30", agent="bound")

    assert "alive" not in one.stdout, one.stderr
    assert one.returncode != 0
    assert any("memory_max" in words for words in said["warnings"]), said
    assert two.stdout.count("alive") < 2, two
    assert (fits.returncode, fits.stdout) == (0, "alive\n"), fits.stderr
    rig.clean()


def test_a_fork_bomb_is_bounded(rig: Rig) -> None:
    """No more tasks than the limit, and meanwhile everybody else starts what they want; without a limit all start."""
    if not _held(rig):
        return
    began = time.monotonic()
    bomb = rig.sh(BOMB, agent="bound", timeout=120)
    said = rig.receipt()
    free = rig.sh(BOMB, agent="free", timeout=120)

    assert "fork" in bomb.stderr, bomb
    assert any("tasks_max was reached" in words for words in said["warnings"]), said
    assert "started" in free.stdout
    assert "fork" not in free.stderr
    assert time.monotonic() - began < 120
    rig.clean()


def test_processor_time_is_bounded(rig: Rig) -> None:
    """Two busy processes get half a processor together; without a quota more than one, where there are two."""
    if not _held(rig):
        return
    half = rig.sh(BURN, agent="bound", timeout=120)
    assert 0.2 < float(half.stdout) < 0.8, half
    wanted = 0.9 if (os.cpu_count() or 1) > 1 else 0.7
    free = [float(rig.sh(BURN, agent="free", timeout=120).stdout)]
    while free[-1] <= wanted and len(free) < 8:  # others are busy as well
        free.append(float(rig.sh(BURN, agent="free", timeout=120).stdout))
    assert free[-1] > wanted, free
    rig.clean()
