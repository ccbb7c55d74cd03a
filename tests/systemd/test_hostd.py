"""Root's daemon in a real systemd: who may start what where, and what stands then. The broker is a stand-in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostd_rig import ACCOUNT, Rig
from support.machines import Machine


@pytest.fixture(scope="module")
def rig(machine: Machine) -> Iterator[Rig]:
    """Hostd and a broker's stand-in, for all tests of this file."""
    rig = Rig(machine)
    rig.start_broker()
    yield rig
    rig.close()


@pytest.fixture
def project(rig: Rig) -> Iterator[str]:
    """A directory of alice's that is below a granted root, with a file in it."""
    path = "/home/alice/p/my proj:%x"
    rig.machine.run(["mkdir", "-p", path], user="alice")
    rig.machine.run(["sh", "-c", 'echo hers >"$0/hers"', path], user="alice")
    yield path
    rig.machine.run(["rm", "-rf", "/home/alice/p"])


def test_a_run_in_the_own_project(rig: Rig, project: str) -> None:
    """Alice's agent runs as an account of ours in her project, what it makes is hers, and nothing is left of the unit."""
    script = "id -un; pwd; cat hers; echo made >made; cat /run/cloister/box/note; ls -A /home /home/alice"
    rig.answer(rig.plan(["/bin/sh", "-c", script]))
    answer, printed, run = rig.ask(project)
    assert answer == [["J", {"receipt": {"exit": 0}}]], rig.told()
    lines = printed.splitlines()
    assert lines[:4] == [ACCOUNT, project, "hers", "of the broker"]
    assert rig.machine.run(["stat", "-c", "%U %G", f"{project}/made"]).stdout.strip() == "alice alice"
    assert run not in rig.machine.run(["systemctl", "list-units", "--all", "cloister-run-*"]).stdout
    assert not rig.machine.path(f"/run/cloister/units/{run}").exists()
    assert rig.machine.run(["ls", "/var/lib/cloister/hostd/runs"]).stdout == ""
