"""Records and locks of living runs: who holds one, what a user has under way, and broken records."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec
import pytest

from cloister.host import unit_records
from cloister.plan.steps import Launch, Plan

pytestmark = pytest.mark.kernel
PLAN = Plan(
    run="r", agent="pi", preset="pi", isolation="unit", workspace="/w", policy_digest="",
    steps=(Launch(argv=(), command=(), directory="/", environment={}),),
)  # fmt: skip


def record(run: str, uid: int = 1000, carried: int = 0) -> unit_records.Record:
    """Return a record."""
    return unit_records.Record(
        run=run, unit=f"cloister-run-{run}.service", state="started", caller="alice", caller_uid=uid,
        account="cl-pi-alice", root="/", workspace="/w", carried=carried, plan=PLAN,
    )  # fmt: skip


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    """A second one is refused until the first is freed; who waits gets it, also when its file was removed with it."""
    place = str(tmp_path)
    first = unit_records.Lock("run", place)
    with pytest.raises(BlockingIOError):
        unit_records.Lock("run", place)
    threading.Timer(0.1, first.release, kwargs={"remove": True}).start()
    second = unit_records.Lock("run", place, wait_s=5)
    assert (tmp_path / "run.lock").exists()
    with pytest.raises(BlockingIOError):
        unit_records.Lock("run", place, wait_s=0.05)
    second.release()


def test_what_a_user_has_under_way(tmp_path: Path) -> None:
    """Runs and carried bytes are counted per user, and a record that cannot be read is nobody's, but listed."""
    place = str(tmp_path)
    for run, uid, carried in (("a", 1000, 5), ("b", 1000, 7), ("c", 1001, 100)):
        unit_records.write(record(run, uid, carried), place)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "../x.json").write_text("{}")
    assert unit_records.living_of(1000, place) == (2, 12)
    assert unit_records.recorded(place) == ["a", "b", "broken", "c"]
    assert unit_records.read("broken", place) is None
    assert unit_records.read("a", place) == record("a", 1000, 5)
    assert unit_records.recorded(f"{place}/none") == []


@pytest.mark.parametrize(
    ("text", "good"), [("0123-ab", True), ("", False), ("../x", False), ("-x", False), ("A", False)]
)
def test_ids_of_runs(text: str, *, good: bool) -> None:
    """The id of a run is a plain word, so that no file or unit of another name is ever touched."""
    assert unit_records.is_run(text) is good


def test_a_record_is_one_json_file(tmp_path: Path) -> None:
    """It is replaced as a whole, mode 0600, and says everything that undoing needs."""
    unit_records.write(record("a"), str(tmp_path))
    unit_records.write(msgspec.structs.replace(record("a"), invocation="i"), str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["a.json"]
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600
    found = unit_records.read("a", str(tmp_path))
    assert found is not None
    assert found.invocation == "i"
