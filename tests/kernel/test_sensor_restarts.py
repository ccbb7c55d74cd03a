"""A sensor that is killed: the next one watches the same runs, and the log says what was unseen."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.sensor_rig import SensorRig, sensor_rig

pytestmark = [pytest.mark.kernel, pytest.mark.root]


@pytest.fixture
def rig() -> Iterator[SensorRig]:
    """A sensor of its own, which may be killed."""
    with sensor_rig("--calls", "off") as one:
        yield one


def restart(rig: SensorRig) -> None:
    """Kill the sensor, and start another as systemd does; the keeper stays."""
    rig.process.kill()
    rig.process.wait(10)
    rig.turn(0.2)
    rig.begin()
    rig.source._next_try = 0.0
    rig._wait(rig._followed)


def of(rig: SensorRig, run: str, *kinds: str) -> list[dict[str, Any]]:
    """Return the events of one run."""
    return [one for one in rig.lines(*kinds) if one.get("run") == run]


def words(rig: SensorRig, run: str) -> list[list[str]]:
    """Return what a run launched."""
    return [one["process"].get("cmd_line", []) for one in of(rig, run, "process.executed")]


def test_the_next_sensor_watches_the_same_cgroups(rig: SensorRig) -> None:
    """A living run is seen again without being asked for; one that ended meanwhile is told; both gaps are events."""
    lives = rig.cgroup("lives", run="r-lives", agent="pi", user="alice")
    over = rig.cgroup("over", run="r-over")
    rig.run(lives, ["/bin/true", "before"])
    rig.turn()
    rig.process.kill()
    rig.process.wait(10)
    rig.turn(0.2)
    os.rmdir(over)
    os.mkdir(over)  # the same path, another cgroup
    rig.begin()
    rig.source._next_try = 0.0
    rig._wait(rig._followed)
    rig.run(lives, ["/bin/true", "after"])
    rig.run(over, ["/bin/true", "stranger"])
    rig.turn(0.2)

    assert ["/bin/true", "before"] in words(rig, "r-lives")
    assert ["/bin/true", "after"] in words(rig, "r-lives")
    assert not any("stranger" in one["process"].get("cmd_line", []) for one in rig.lines("process.executed"))
    (gap,) = of(rig, "r-lives", "log.lost")
    assert (gap["reason"], gap["agent"], gap["user"]) == ("sensor-restarted", "pi", "alice")
    assert 0 < gap["details"]["unseen_ms"] < 60_000
    assert [one["details"]["watched"] for one in of(rig, "r-over", "log.lost")] == ["ended"]
    rig.end_cgroups()
    assert len(of(rig, "r-lives", "kernel.counted")) == 1
    assert rig.store.held() == [], "nothing is kept of watches that are over"


def test_a_gap_is_told_once_and_a_second_restart_again(rig: SensorRig) -> None:
    """Another keeper hears of no gap that was told; another restart is another gap."""
    path = rig.cgroup("twice", run="r-twice")
    restart(rig)
    rig.close_keeper()
    rig.open_keeper()
    rig.turn(0.1)
    assert len(of(rig, "r-twice", "log.lost")) == 1
    restart(rig)
    rig.run(path, ["/bin/true", "third"])
    rig.turn(0.1)
    assert len(of(rig, "r-twice", "log.lost")) == 2
    assert ["/bin/true", "third"] in words(rig, "r-twice")


def test_a_namespace_is_watched_until_its_owner_lets_go(rig: SensorRig) -> None:
    """The connection that asked is kept too: the run is seen after a restart, and its watch ends as it would have."""
    inner = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "sh", "-c",
         "read go; /bin/true again; read go"],
        stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert inner.stdin
    child = Path(f"/proc/{inner.pid}/task/{inner.pid}/children")
    rig._wait(lambda: bool(child.read_text().split()))
    asked = rig.watch(f"/proc/{child.read_text().split()[0]}/ns/pid", run="r-space")
    restart(rig)
    inner.stdin.write("go\n")
    inner.stdin.flush()
    rig.turn(0.3)
    assert ["/bin/true", "again"] in words(rig, "r-space")
    asked.close()
    time.sleep(0.2)
    rig.turn(0.3)
    assert len(of(rig, "r-space", "kernel.counted")) == 1
    inner.communicate("end\n", timeout=20)
