"""The end of a microVM's workspace: applied when nobody needs to look, kept for review otherwise, never lost."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import vm_disk_rig as rig

from cloister.errors import CloisterError, UsageError
from cloister.plan.changes import Change
from cloister.plan.workspace import Mount, WorkspaceLayout
from cloister.runs import collect, review, vm_workspace
from cloister.runs.store import Record, Store
from cloister.runs.vm_workspace import Ended

pytestmark = pytest.mark.kernel

RUN = "0123456789ab"


class Made:
    """A finished run of a guest whose workspace is still on its disk."""

    def __init__(self, place: Path, mode: str) -> None:
        self.root = place / "work"
        self.root.mkdir()
        (self.root / "README").write_text("hello\n")
        (self.root / "old").write_text("old\n")
        self.scratch = place
        self.store = Store(str(place / "runs"))
        self.folder = place / "runs" / RUN
        self.disk = self.folder / "vm/workspace.img"
        self.disk.parent.mkdir(parents=True)
        self.mode = mode
        self.started = time.time() + 1  # what was made above is older than the run, whatever the clock's ticks
        self.store.update(
            Record(
                id=RUN, agent="shell", workspace=str(self.root), command=("true",), status="finished",
                started=self.started, broker_pid=1, mode=mode, finished=self.started,
            )
        )  # fmt: skip

    def fill(self, shown: WorkspaceLayout | None = None) -> None:
        """Give the guest its disk."""
        rig.fill(self.root, self.disk, shown)

    def write(self, name: str, content: bytes) -> None:
        """Do what a guest does."""
        rig.write(self.disk, name, content, scratch=self.scratch)

    def end(self) -> Ended:
        """End the workspace as the broker does."""
        direct = self.mode == "direct"
        return vm_workspace.end(str(self.folder), str(self.root), started=self.started, direct=direct)

    def changes(self) -> list[Change]:
        """What `cloister diff` finds."""
        with review.reviewed(self.store, RUN) as (_, opened):
            return opened.changes()

    def left(self) -> set[str]:
        """What is left of the run besides its record."""
        return {path.name for path in self.folder.rglob("*") if path.is_file()} - {"run.json"}


@pytest.fixture
def direct(tmp_path: Path) -> Made:
    """A run in mode `direct`."""
    return Made(tmp_path, "direct")


@pytest.fixture
def overlay(tmp_path: Path) -> Made:
    """A run in mode `overlay`."""
    return Made(tmp_path, "overlay")


def test_direct_changes_are_in_the_workspace(direct: Made) -> None:
    """Where nobody needs to look, the host has what the guest had, and nothing else is left."""
    direct.fill()
    direct.write("/README", b"changed\n")
    direct.write("/new", b"new\n")
    rig.debugfs(direct.disk, "rm /old", "mkdir /d")
    assert direct.end() == Ended(4, applied=True)
    assert rig.on_host(direct.root) == {b"README": b"changed\n", b"new": b"new\n", b"d": None}
    assert direct.left() == set()
    with pytest.raises(UsageError, match="directly"):
        direct.changes()


def test_a_run_that_changed_nothing_leaves_nothing(direct: Made, overlay_twin: Made) -> None:
    """No changes, no copy, in either mode."""
    for made in (direct, overlay_twin):
        made.fill()
        assert made.end() == Ended()
        assert made.left() == set()


@pytest.fixture
def overlay_twin(tmp_path: Path) -> Made:
    """A run in mode `overlay` beside the other."""
    place = tmp_path / "twin"
    place.mkdir()
    return Made(place, "overlay")


@pytest.mark.parametrize("name", ["/.vscode", "/.git"])
def test_direct_changes_that_ask_are_kept_whole(direct: Made, name: str) -> None:
    """One protected name keeps all of a run's changes for review: nothing is applied by halves without a person."""
    direct.fill()
    direct.write("/README", b"changed\n")
    rig.debugfs(direct.disk, f"mkdir {name}")
    direct.write(f"{name}/config", b"x")
    ended = direct.end()
    assert not ended.applied
    assert f"cloister diff {RUN}" in ended.notices[0]
    assert (direct.root / "README").read_text() == "hello\n"
    assert not direct.disk.exists()
    found = {change.path: bool(change.asks) for change in direct.changes()}
    assert found["README"] is False
    assert found[f"{name[1:]}/config"] is True


def test_what_the_policy_protects_is_kept_for_review(direct: Made) -> None:
    """A path of workspace.protect is read-only in the guest; when its root user writes it, nothing is applied."""
    mounts = [Mount("ro", f"{direct.root}/README", f"{direct.root}/README")]
    direct.fill(rig.layout(direct.root, mounts=mounts))
    direct.write("/README", b"forged\n")
    ended = direct.end()
    assert "README is protected" in ended.notices[0]
    assert (direct.root / "README").read_text() == "hello\n"


def test_what_changed_on_the_host_meanwhile_is_not_overwritten(direct: Made) -> None:
    """A file that the person wrote, made or removed during the run keeps the guest's changes for review."""
    for act in ("written", "made", "removed"):
        place = direct.scratch / act
        place.mkdir()
        made = Made(place, "direct")
        made.started = 0.0 if act == "removed" else made.started
        made.fill()
        made.write("/README", b"guest\n")
        made.write("/new", b"guest\n")
        if act == "written":
            (made.root / "README").write_text("person\n")
        elif act == "made":
            (made.root / "new").write_text("person\n")
        else:
            (made.root / "README").unlink()
        before = rig.on_host(made.root)
        ended = made.end()
        assert "changed on the host meanwhile" in ended.notices[0], act
        assert rig.on_host(made.root) == before


def test_overlay_changes_wait(overlay: Made) -> None:
    """In overlay mode nothing is written until it is said; then `apply` and `discard` work as for any run."""
    overlay.fill()
    overlay.write("/README", b"changed\n")
    assert overlay.end() == Ended(1)
    assert (overlay.root / "README").read_text() == "hello\n"
    assert [change.path for change in overlay.changes()] == ["README"]
    with review.reviewed(overlay.store, RUN) as (_, opened):
        review.apply(opened, opened.changes(), force=False, protected=False)
    review.discard(overlay.store, RUN)
    assert (overlay.root / "README").read_text() == "changed\n"
    assert overlay.left() == set()


@pytest.mark.parametrize("mode", ["direct", "overlay"])
def test_a_disk_that_nobody_handed_back_is_by_the_review(tmp_path: Path, mode: str) -> None:
    """A broker that died with the run still on its disk loses nothing: `cloister diff` hands back, and waits."""
    made = Made(tmp_path, mode)
    made.fill()
    made.write("/README", b"changed\n")
    assert [change.path for change in made.changes()] == ["README"]
    assert not made.disk.exists()
    assert (made.root / "README").read_text() == "hello\n"
    assert [change.path for change in made.changes()] == ["README"]


def test_a_broker_that_died_after_the_hand_back_goes_on(overlay: Made) -> None:
    """Between hand-back and the disk's removal, both are there: the next look removes the disk and nothing else."""
    overlay.fill()
    overlay.write("/README", b"changed\n")
    kept = {path: path.read_bytes() for path in (overlay.disk, Path(f"{overlay.disk}.baseline"))}
    overlay.end()
    for path, data in kept.items():
        path.write_bytes(data)
    assert [change.path for change in overlay.changes()] == ["README"]
    assert not overlay.disk.exists()


def test_a_disk_that_cannot_be_read_stays(overlay: Made) -> None:
    """An error says why, at the end and at each later look; the disk is kept until it is discarded or collected."""
    overlay.fill()
    os.truncate(overlay.disk, 5000)
    for look in (overlay.end, overlay.changes):
        with pytest.raises(CloisterError) as refused:
            look()
        assert refused.value.reference == "vm-disk-broken"
    assert overlay.disk.exists()
    review.discard(overlay.store, RUN)
    assert overlay.left() == set()


def test_a_run_on_its_disk_is_not_collected(overlay: Made) -> None:
    """`cloister gc` takes a disk with changes nobody has seen only when told so, as with other changes."""
    overlay.fill()
    assert vm_workspace.left(str(overlay.folder))
    rules = collect.Rules(now=time.time() + 1e9, older_than_s=0, living=frozenset(), etc_in_use="")
    paths = type("P", (), {"runs": str(overlay.folder.parent)})()
    assert [one.kind for one in collect._records(paths, rules)] == []
    lost = collect.Rules(now=time.time() + 1e9, older_than_s=0, living=frozenset(), etc_in_use="", overlays=True)
    assert [one.kind for one in collect._records(paths, lost)] == ["overlay"]
