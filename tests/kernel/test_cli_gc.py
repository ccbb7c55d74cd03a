"""`cloister gc` on real leftovers: a killed broker's runs, old records, modes that stop a plain removal."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from cloister.runs.collect import Leftover, remove
from support.cloister import User, wait_for

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


def test_removing_copes_with_modes_and_follows_no_link(tmp_path: Path) -> None:
    """Directories of mode 0000, as overlayfs makes them, go; what a link inside leads to stays, mode and all."""
    (tmp_path / "precious").mkdir(mode=0o755)
    (tmp_path / "precious/file").write_text("x")
    folder = tmp_path / "run"
    (folder / "overlay/work/work").mkdir(parents=True)
    (folder / "overlay/link").symlink_to(tmp_path / "precious")
    (folder / "overlay/work/file").symlink_to(tmp_path / "precious/file")
    (folder / "overlay/work/work").chmod(0)

    assert remove(Leftover(kind="overlay", path=str(folder), bytes=0, why=""))
    assert not folder.exists()
    assert (tmp_path / "precious/file").read_text() == "x"
    assert (tmp_path / "precious").stat().st_mode & 0o777 == 0o755


def test_a_dry_run_says_what_the_real_one_does(user: User, workspace: Path) -> None:
    """The dry run changes nothing; the real one removes exactly what it listed; the newest stays when young."""
    for _ in range(2):
        assert user.inside("true", cwd=workspace).returncode == 0
    user.close()
    time.sleep(1.1)
    before = sorted(str(path) for path in user.state.rglob("*"))
    dry = json.loads(user.run("gc", "--older-than", "1s", "--dry-run", "--json", cwd=workspace).stdout)
    assert sorted(str(path) for path in user.state.rglob("*")) == before
    kept = json.loads(user.run("gc", "--json", cwd=workspace).stdout)
    real = json.loads(user.run("gc", "--older-than", "1s", "--json", cwd=workspace).stdout)

    assert kept["removed"] == []
    assert {one["path"] for one in dry["removed"]} == {one["path"] for one in real["removed"]}
    assert real["bytes"] > 0
    assert user.records() == []


def test_history_goes_with_its_project(user: User, workspace: Path) -> None:
    """State names its project; it stays while that is there, and goes when it is gone and old enough."""
    assert user.inside("true", cwd=workspace).returncode == 0
    user.close()
    state = next(user.state.glob("agents/shell/*"))
    assert json.loads((state / "project.json").read_text()) == {"path": str(workspace), "git": f"{workspace}/.git"}
    user.run("gc", "--older-than", "1s", cwd=user.home)
    assert state.exists()
    shutil.rmtree(workspace)
    for path in (state, *state.rglob("*")):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    user.run("gc", "--older-than", "1s", cwd=user.home)

    assert not state.exists()


def test_what_a_killed_broker_left_is_undone(user: User, workspace: Path) -> None:
    """After kill -9 of the broker, ps says `died`; gc closes the record, and no runtime file or placeholder stays."""
    process = user.start("run", "shell", "--", "sleep", "60", cwd=workspace)
    user.wait_running()
    run = user.records()[0]["id"]
    pid = user.broker_pid
    descriptor = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    wait_for(descriptor)
    os.close(descriptor)
    process.communicate(timeout=20)
    listed = json.loads(user.run("ps", "--json", cwd=workspace).stdout)
    assert [(row["id"], row["status"]) for row in listed] == [(run, "died")]
    early = user.run("receipt", run, cwd=workspace)
    assert (early.returncode, "run-not-over" in early.stderr) == (64, True)

    assert user.run("gc", cwd=workspace).returncode == 0
    assert json.loads(user.run("receipt", run, "--json", cwd=workspace).stdout)["reason"] == "broker-died"
    assert list((user.runtime / "cloister/runs").iterdir()) == []
    assert not (workspace / ".vscode").exists()
    user.close()


NESTED = """
import os
for _ in range(3000):
    os.mkdir("d")
    os.chdir("d")
open("file", "w").close()
"""


def test_what_an_agent_has_nested_is_removed(user: User, workspace: Path) -> None:
    """Three thousand directories within each other are a change to review, then counted and removed by `gc`."""
    user.write_policy('schema = 1\n[agents.shell]\npreset = "shell"\nworkspace.mode = "overlay"\n')
    ended = user.run("run", "shell", "--", "python3", "-c", NESTED, cwd=workspace)
    assert ended.returncode == 0, ended.stderr
    user.close()
    time.sleep(1.1)
    gone = user.run("gc", "--older-than", "1s", "--overlays", "--json", cwd=workspace)
    assert gone.returncode == 0, gone.stderr
    (overlay,) = (one for one in json.loads(gone.stdout)["removed"] if one["kind"] != "socket")
    assert overlay["bytes"] > 1000 * 4096
    assert list(user.state.glob("runs/*")) == []
