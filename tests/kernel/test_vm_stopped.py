"""Files off the disks of machines that do not run: a run's that nobody has handed back, and a snapshot's."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vm_disk_rig as rig

from cloister.errors import CloisterError, RetryError, UsageError
from cloister.host import vm_snapshot
from cloister.host.vm_copy import take_out
from cloister.plan.vm_snapshot import Disk, Snapshot
from cloister.runs import vm_workspace
from cloister.runs.vm_stopped import Stopped, find_stopped, take_from

pytestmark = pytest.mark.kernel

RUN = "0123456789ab"


class Places:
    """A run that is over, its disk, and the directory of snapshots."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.root = place / "work"
        (self.root / "src").mkdir(parents=True)
        (self.root / "src/a").write_text("a")
        self.folder = place / "runs" / RUN
        self.disk = self.folder / "vm/workspace.img"
        self.disk.parent.mkdir(parents=True)
        rig.fill(self.root, self.disk)
        self.paths: Any = SimpleNamespace(snapshots=str(place / "snapshots"))

    def store(self, *, vm: object = "machine") -> Any:
        """Records that know this run only."""

        def find(word: str) -> str:
            if RUN.startswith(word):
                return RUN
            raise UsageError("run-unknown", "no run")

        plan = SimpleNamespace(launch=SimpleNamespace(vm=vm), workspace=str(self.root))
        return SimpleNamespace(find=find, plan=lambda _run: plan, directory=str(self.folder.parent))

    def found(self, word: str = RUN) -> Stopped:
        """What a word means."""
        return find_stopped(self.paths, self.store(), word)

    def take(self, stopped: Stopped, path: str) -> str:
        """Read one file."""
        target = self.place / f"out{time.monotonic_ns()}"
        take_from(stopped, path, functools.partial(take_out, target=str(target), most_bytes=1 << 20))
        return target.read_text()


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """One of them."""
    return Places(tmp_path)


def test_a_run_whose_disk_is_there_is_read(places: Places) -> None:
    """By /workspace and by the host's path, as the guest knows both; nothing is handed back by it."""
    rig.write(places.disk, "/made", b"in the guest", scratch=places.place)
    assert places.take(places.found(), "/workspace/made") == "in the guest"
    assert places.take(places.found("0123"), f"{places.root}/src/../src/a") == "a"
    assert vm_workspace.left(str(places.folder))
    with pytest.raises(UsageError, match="no such file"):
        places.take(places.found(), "/workspace/nothing")


@pytest.mark.parametrize("path", ["/etc/passwd", "/var/tmp/x", "/workspace2/src", "/workspace/../etc/passwd", "/"])
def test_a_path_on_no_disk_is_refused(places: Places, path: str) -> None:
    """What was in memory, or is in the image, or is the agent's own disk, is not there; it says what is."""
    with pytest.raises(UsageError) as refused:
        places.take(places.found(), path)
    assert refused.value.reference == "vm-disk-path"


def test_a_disk_that_was_handed_back_is_said_to_be_gone(places: Places) -> None:
    """It says where the files are: in the review, or in the workspace; a run without a machine has no disk."""
    rig.write(places.disk, "/made", b"x", scratch=places.place)
    vm_workspace.end(str(places.folder), str(places.root), started=time.time(), direct=False)
    with pytest.raises(UsageError, match="wait for review") as kept:
        places.found()
    assert (kept.value.reference, kept.value.remedy) == ("vm-disk-gone", f"cloister diff {RUN}")
    (places.folder / "overlay/upper").rename(places.place / "applied")
    with pytest.raises(UsageError, match="are in the workspace"):
        places.found()
    with pytest.raises(UsageError) as other:
        find_stopped(places.paths, places.store(vm=None), RUN)
    assert other.value.reference == "vm-not"


def test_a_snapshot_is_read(places: Places) -> None:
    """Its workspace, and what its guests have written below /var; it stays as it was kept."""
    guest = places.place / "var"
    (guest / "upper/tmp").mkdir(parents=True)
    (guest / "upper/tmp/note").write_text("note")
    (guest / "state").mkdir()
    var = places.place / "var.img"
    rig.fill(guest, var)
    files = {"var": str(var), "workspace": str(places.disk)}

    def describe(disks: tuple[Disk, ...], paused: float) -> Snapshot:
        return Snapshot(
            name="before", run=RUN, agent="shell", profile="", workspace=str(places.root), asked=("sh",), image="x",
            version=1, manifest="0" * 64, made=1.0, paused_s=paused, fields=(), disks=disks,
        )  # fmt: skip

    vm_snapshot.take(places.paths.snapshots, "before", files, describe, contextlib.nullcontext)
    kept = places.found("before")
    before = {path.name for path in Path(places.paths.snapshots, "before").iterdir()}
    assert places.take(kept, "/workspace/src/a") == "a"
    assert places.take(kept, "/var/tmp/note") == "note"
    assert {path.name for path in Path(places.paths.snapshots, "before").iterdir()} == before
    with pytest.raises(UsageError, match="below /var"):
        places.take(kept, "/etc/passwd")
    for word in ("nothing", "../snapshots/before", ".."):
        with pytest.raises(UsageError):
            places.found(word)


def test_a_disk_that_its_monitor_still_has_is_not_read(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed broker's monitor lives for a moment: neither a copy nor a review takes half of its last writes."""
    monkeypatch.setattr(vm_workspace, "_PATIENCE_S", 0.1)
    monitor = os.open(places.disk, os.O_RDWR)
    fcntl.flock(monitor, fcntl.LOCK_EX)
    for look in (
        lambda: places.take(places.found(), "/workspace/src/a"),
        lambda: vm_workspace.hand_back(str(places.folder), str(places.root)),
    ):
        with pytest.raises(RetryError) as held:
            look()
        assert held.value.reference == "vm-disk-held"
    os.close(monitor)
    assert places.take(places.found(), "/workspace/src/a") == "a"


def test_a_disk_is_not_handed_back_while_it_is_read(places: Places) -> None:
    """Who ends the run waits for the reader; a reader that comes too late is told so, and a broken disk is an error."""
    stopped = places.found()
    held = os.open(places.folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    got: list[str] = []
    thread = threading.Thread(target=lambda: got.append(places.take(stopped, "/workspace/src/a")))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    os.close(held)
    thread.join(20)
    assert got == ["a"]
    os.truncate(places.disk, 5000)
    with pytest.raises(CloisterError) as broken:
        places.take(stopped, "/workspace/src/a")
    assert broken.value.reference == "vm-disk-broken"
    vm_workspace.drop(str(places.folder))
    with pytest.raises(UsageError) as late:
        places.take(stopped, "/workspace/src/a")
    assert late.value.reference == "vm-disk-gone"
