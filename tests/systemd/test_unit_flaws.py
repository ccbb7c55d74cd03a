"""Flaws of systems before this one that no other file here has: each the original attack or mishap, tried again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from runs_rig import POLICY, POLICY_FILE, Rig

from support.machines import Machine

WORKSPACES = POLICY.replace('roots = ["~/p"]', 'roots = ["~/a", "~/p", "/srv/shared-projects"]', 1)


@pytest.fixture(scope="module")
def rig(suite: str, layers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One installed machine for the tests of this file, on Debian 12 and 13."""
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"flaws-{suite}")) as machine:
        yield Rig(machine)


def test_a_workspace_keeps_its_name_when_another_root_comes_or_goes(rig: Rig) -> None:
    """PF14: products file their history under the directory, so it must not shift; nobody else's roots are seen."""
    seen = "pwd; ls -A /home /home/alice /srv 2>/dev/null; cat /proc/self/mountinfo"
    rig.machine.write(POLICY_FILE, WORKSPACES)
    rig.machine.run(["cloister", "apply", "--yes"], timeout=60)
    without = rig.sh(seen)
    rig.machine.run(["mkdir", "-p", "a", "p"], user="alice")
    rig.machine.run(["mkdir", "-p", "/srv/shared-projects"])
    try:
        beside = rig.sh(seen)
    finally:
        rig.machine.run(["rm", "-rf", "/home/alice/a", "/srv/shared-projects"])
        rig.machine.write(POLICY_FILE, POLICY)
        rig.machine.run(["cloister", "apply", "--yes"], timeout=60)
    assert (without.returncode, beside.returncode) == (0, 0), (without.stderr, beside.stderr)
    assert without.stdout.splitlines()[0] == beside.stdout.splitlines()[0] == rig.project
    for told in (without.stdout, beside.stdout):
        assert "bob" not in told
        assert "shared-projects" not in told
    rig.clean()


def test_a_pipe_gets_what_the_agent_wrote_and_a_record_is_kept(rig: Rig) -> None:
    """PF17: no terminal is put between: no CR, errors apart from output; and who, when, where and how it ended stay."""
    done = rig.sh(
        "printf 'one\\ntwo\\n'; printf 'wrong\\n' >&2; test -t 0 || test -t 1 && echo terminal; exit 3", input=""
    )
    receipt = rig.receipt()
    assert (done.returncode, done.stdout, done.stderr) == (3, "one\ntwo\n", "wrong\n")
    assert (receipt["exit_code"], receipt["workspace"]) == (3, rig.project)
    assert receipt["finished"] >= receipt["started"] > 0
    assert "alice started cl-sh-alice" in rig.machine.journal("cloister-hostd.service")
    rig.clean()


def test_nothing_of_ours_needs_sudo_or_is_set_user_id(rig: Rig) -> None:
    """PF1, PF18: no rule for sudo, no program of ours with a set-id bit; what root runs only root can change."""
    found = rig.machine.run(["find", "/opt/cloister", "/usr/local/bin", "-perm", "/6000", "-type", "f"]).stdout
    sudo = rig.machine.path("/etc/sudoers.d")
    words = "find /opt/cloister -not -type l ( -not -user root -o -perm /022 )"
    root_only = rig.machine.run(words.split()).stdout
    assert found == ""
    assert not (sudo.exists() and any("cloister" in name for name in os.listdir(sudo)))
    assert root_only == ""


def test_an_account_that_is_not_there_starts_nothing(rig: Rig) -> None:
    """PF18: where the agent's user is gone, or has another number, a run is refused, with what to type."""
    passwd = rig.machine.read("/etc/passwd")
    assert rig.sh("true").returncode == 0
    for changed in (
        "".join(line for line in passwd.splitlines(keepends=True) if not line.startswith("cl-sh-alice:")),
        passwd.replace("cl-sh-alice:x:1900000", "cl-sh-alice:x:1900007"),
    ):
        assert changed != passwd
        rig.machine.write("/etc/passwd", changed)
        try:
            done = rig.sh("true")
        finally:
            rig.machine.write("/etc/passwd", passwd)
        assert done.returncode == 125
        assert "account-missing" in done.stderr
        assert "sudo cloister apply" in done.stderr
    assert rig.sh("true").returncode == 0
    rig.clean()


# Counts each TERM at once and stays half a second, so that a second one meets it; a shell would take two for one.
POLITE = """exec python3 -c '
import signal, time
signal.signal(signal.SIGTERM, lambda *_: open("heard", "a").write("x\\n"))
open("up", "w").close()
signal.pause()
time.sleep(0.5)
'"""


def test_the_agent_hears_a_polite_end_once(rig: Rig) -> None:
    """`systemctl stop` tells the shim alone, which tells the agent: not both of them (KillMode=mixed)."""
    for _ in range(5):
        rig.machine.run(["rm", "-f", "heard", "up"], user="alice", cwd=rig.project)
        unit = f"cloister-run-{rig.detach(POLITE)}.service"
        rig.until(lambda: rig.machine.path(f"{rig.project}/up").exists())
        rig.machine.run(["systemctl", "stop", unit])
        # A flaw of systemd 257 on a loaded machine: to it the first process of PrivatePIDs= is somebody else's where
        # the one between them has not ended yet. It says so, and kills at once instead of waiting.
        if "which is not our child" not in rig.machine.run(["journalctl", "-u", unit, "-o", "cat"]).stdout:
            break
    said = rig.machine.run(["cat", "heard"], user="alice", cwd=rig.project, check=False).stdout
    rig.machine.run(["rm", "-f", "heard", "up"], user="alice", cwd=rig.project)
    rig.clean()
    assert said == "x\n"
