"""What gc takes and what it leaves: by age, by life, by whether the project is still there."""

import json
import os
from pathlib import Path

import msgspec
import pytest

from cloister.runs.collect import Rules, survey
from cloister.runs.paths import Paths
from cloister.runs.store import Record

NOW = 2_000_000_000.0
DAY = 86400.0


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """Places below a temporary directory."""
    return Paths(*(str(tmp_path / name) for name in ("home", "config", "state", "runtime")))


def _run(paths: Paths, run: str, age_days: float, *, finished: bool = True, overlay: bool = False) -> Path:
    folder = Path(paths.runs, run)
    folder.mkdir(parents=True)
    record = Record(
        id=run, agent="a", workspace="/w", command=("c",), status="finished" if finished else "running", started=0,
        broker_pid=1, finished=NOW - age_days * DAY if finished else None,
    )  # fmt: skip
    (folder / "run.json").write_bytes(msgspec.json.encode(record))
    if overlay:
        (folder / "overlay/work/work").mkdir(parents=True)
    return folder


def _state(paths: Paths, name: str, *, path: str, git: str = "", age_days: float = 99) -> Path:
    folder = Path(paths.agents, "a", name)
    (folder / ".claude").mkdir(parents=True)
    (folder / "project.json").write_text(json.dumps({"path": path, "git": git}))
    for place in (folder / "project.json", folder / ".claude", folder):
        os.utime(place, (NOW, NOW - age_days * DAY))
    return folder


def _survey(paths: Paths, *, living: tuple[str, ...] = (), overlays: bool = False, etc: str = "") -> dict[str, str]:
    rules = Rules(now=NOW, older_than_s=30 * DAY, living=frozenset(living), etc_in_use=etc, overlays=overlays)
    return {one.path: one.kind for one in survey(paths, rules)}


def test_records_go_by_age_and_only_when_over(paths: Paths) -> None:
    """Old finished runs go; young ones and those that are not over stay, whatever their age."""
    old = _run(paths, "000000000001", 31)
    _run(paths, "000000000002", 29)
    _run(paths, "000000000003", 0, finished=False)

    assert _survey(paths) == {str(old): "record"}


def test_pending_changes_stay_unless_asked_for(paths: Paths) -> None:
    """An overlay nobody applied or discarded is never taken without --overlays, however old."""
    folder = _run(paths, "000000000001", 999, overlay=True)

    assert _survey(paths) == {}
    assert _survey(paths, overlays=True) == {str(folder): "overlay"}


def test_state_goes_with_its_project(paths: Paths, tmp_path: Path) -> None:
    """History goes when its git directory, or without one its path, is gone and it was not used for long."""
    (tmp_path / "here/.git").mkdir(parents=True)
    gone = _state(paths, "1", path="/nowhere")
    worktree_gone = _state(paths, "2", path="/nowhere/tree", git=str(tmp_path / "here/.git"))
    clone_gone = _state(paths, "3", path=str(tmp_path / "here"), git="/nowhere/.git")
    used = _state(paths, "4", path="/nowhere", age_days=3)
    there = _state(paths, "5", path=str(tmp_path / "here"))
    found = _survey(paths)

    assert found == {str(gone): "state", str(clone_gone): "state"}
    assert not {str(worktree_gone), str(used), str(there)} & set(found)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"path": 3', "null", '{"path": "", "git": ""}'])
def test_state_of_an_unknown_project_stays(paths: Paths, text: str) -> None:
    """Without a readable record of its project, history is not taken."""
    folder = _state(paths, "1", path="/nowhere")
    (folder / "project.json").write_text(text)

    assert _survey(paths) == {}


def test_copies_of_etc_stay_while_in_use(paths: Paths) -> None:
    """The copy of the next start stays; others and interrupted ones go."""
    for name in ("aa", "bb", "cc.123", "dd.456"):
        Path(paths.etc, name).mkdir(parents=True)
    os.utime(Path(paths.etc, "cc.123"), (NOW, NOW - 7200))
    os.utime(Path(paths.etc, "dd.456"), (NOW, NOW - 10))

    assert _survey(paths, etc=f"{paths.etc}/aa") == {f"{paths.etc}/bb": "etc", f"{paths.etc}/cc.123": "etc"}


def test_runtime_of_the_living_stays(paths: Paths) -> None:
    """Runtime directories of runs that are over go."""
    for run in ("000000000001", "000000000002"):
        Path(paths.runtime, "runs", run).mkdir(parents=True)

    assert _survey(paths, living=("000000000002",)) == {f"{paths.runtime}/runs/000000000001": "runtime"}
