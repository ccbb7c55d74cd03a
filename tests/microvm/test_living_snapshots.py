"""A living machine is kept with its memory, and its processes go on from there, with real guests."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.guest_user import BOOT_S, GuestUser, Installs

COUNT = "exec 9>>/workspace/count; n=0; while :; do n=$((n+1)); echo $n >&9; echo $n > /tmp/now; sleep 0.2; done"
"""Counts in a variable, into a file that it holds open and into one in memory."""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory, image: Installs) -> Iterator[GuestUser]:
    """A user with a workspace."""
    found = GuestUser(tmp_path_factory.mktemp("home"), image)
    (found.home / "p").mkdir()
    yield found
    found.run("stop", "--all", "--grace", "1s", cwd=found.home)
    found.close()


@pytest.fixture
def project(user: GuestUser) -> Path:
    """The directory that machines start in."""
    return user.home / "p"


def vm(user: GuestUser, project: Path, *words: str) -> str:
    """Return what `cloister vm …` prints."""
    done = user.run("vm", *words, cwd=project, timeout_s=BOOT_S)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def now(user: GuestUser, run: str, project: Path) -> int:
    """Return where the counter of a run stands."""
    done = user.exec(run, "cat /tmp/now", cwd=project)
    assert done.returncode == 0, done.stderr
    return int(done.stdout or "0")


def test_processes_go_on_from_where_they_stood(user: GuestUser, project: Path) -> None:
    """A counter goes on in the run that was kept and in the one that goes on from there; its file is still open."""
    run = user.begin(COUNT, cwd=project)
    while now(user, run, project) < 3:
        time.sleep(0.2)
    kept = json.loads(vm(user, project, "snapshot", run, "counting", "--json"))
    assert kept["memory"] is True
    stood = now(user, run, project)
    other = vm(user, project, "restore", "counting").strip()
    assert other != run
    first = now(user, other, project)
    time.sleep(1)
    second = now(user, other, project)
    assert second > first
    lines = [int(line) for line in user.exec(other, "cat /workspace/count", cwd=project).stdout.split()]
    assert lines == list(range(1, len(lines) + 1))
    assert now(user, run, project) > stood
