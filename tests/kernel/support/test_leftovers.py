"""The look for leftovers, attacked: it must see a process that hides behind setsid, and files in the runtime folder."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from support import leftovers

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "PATIENCE_S", 0.2)


def test_a_process_in_its_own_session_is_seen() -> None:
    """A process that left its session is reported, and no longer once it is gone."""
    if os.getuid() == 0:
        pytest.skip("root's processes are not ours alone; `make test` uses a user id of its own")
    before = leftovers.take()
    process = subprocess.Popen(["sleep", "30"], start_new_session=True)
    try:
        with pytest.raises(AssertionError, match="sleep 30"):
            leftovers.check(before)
    finally:
        process.kill()
        process.wait()

    leftovers.check(before)


def test_a_zombie_counts_for_whoever_should_collect_it() -> None:
    """One whose parent lives and does not collect it is reported by its name; after that it is not."""
    if os.getuid() == 0:
        pytest.skip("root's processes are not ours alone; `make test` uses a user id of its own")
    before = leftovers.take()
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(AssertionError, match=f"true .a zombie of {os.getpid()}."):
            leftovers.check(before)
    finally:
        process.wait()

    leftovers.check(before)


def test_an_orphan_that_init_has_not_collected_is_over() -> None:
    """Its parent is gone and it ended: whether init has looked yet or not, nothing of ours is left."""
    before = leftovers.take()
    for _ in range(10):
        subprocess.run(["sh", "-c", "sleep 0.01 & exit"], check=True, timeout=20)
    time.sleep(0.05)

    leftovers.check(before)


def test_a_file_in_the_runtime_folder_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket or lock that stays below XDG_RUNTIME_DIR is reported."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fspath(tmp_path))
    before = leftovers.take()
    (tmp_path / "stale").touch()

    with pytest.raises(AssertionError, match="stale"):
        leftovers.check(before)
