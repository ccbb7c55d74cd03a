"""Root's daemon, killed while it starts a run, and at its own start, when it looks for what is left."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest
from hostd_rig import Rig

from support.machines import PYTHON, TESTS, Machine

GOOD = [["J", {"receipt": {"exit": 0}}]]
PROJECT = "/home/alice/p/killed"


@pytest.fixture(scope="module")
def rig(machine: Machine) -> Iterator[Rig]:
    """Hostd and a broker's stand-in, whose plan does nothing."""
    rig = Rig(machine)
    rig.start_broker()
    rig.answer(rig.plan(["/bin/true"]))
    machine.run(["mkdir", "-p", PROJECT], user="alice")
    yield rig
    machine.run(["rm", "-rf", "/home/alice/p"])
    rig.close()


def test_a_killed_hostd_leaves_nothing(rig: Rig) -> None:
    """SIGKILL of hostd and its children at any moment of a start: its next start has undone what they began."""
    for number in range(5):
        run = f"killed{number}"
        asking = rig.machine.popen(
            [PYTHON, "-m", "support.hostd_client", "pi", run, PROJECT],
            user="alice", cwd="/", env={"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        time.sleep(0.12 + 0.04 * number)
        rig.machine.run(["systemctl", "kill", "-s", "KILL", "cloister-hostd.service"], check=False)
        asking.wait(timeout=30)
        rig.machine.run(["systemctl", "reset-failed", "cloister-hostd.service", "cloister-hostd.socket"], check=False)
        rig.machine.run(["systemctl", "restart", "cloister-hostd.socket"])
        assert rig.ask(PROJECT)[0] == GOOD, rig.told()
        until = time.monotonic() + 10
        while run in rig.machine.run(["ls", "/var/lib/cloister/hostd/runs", "/run/cloister/units"]).stdout:
            assert time.monotonic() < until, rig.told()
            time.sleep(0.1)
        rig.nothing_left(run)


def test_who_tidies_up_does_not_stop_a_start(rig: Rig) -> None:
    """With its first request hostd looks for what is left, and may hold the lock of a run that begins. That waits."""
    runs = "/var/lib/cloister/hostd/runs"
    rig.machine.run(["mkdir", "-p", "-m", "700", runs])
    words = ["flock", f"{runs}/tidied.lock", "sh", "-c", "echo held; sleep 2"]
    tidying = rig.machine.popen(words, stdout=subprocess.PIPE)
    assert tidying.stdout
    assert tidying.stdout.readline().strip() == b"held"
    answer, _, run = rig.ask(PROJECT, run="tidied")
    assert answer == GOOD, rig.told()
    assert tidying.wait(timeout=20) == 0
    rig.nothing_left(run)
