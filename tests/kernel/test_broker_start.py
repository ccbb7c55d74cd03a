"""Starting a broker while another one holds the lock: it is waited for, and what it lets go of is taken."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from support.cloister import User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture
def lock(user: User) -> int:
    """The lock of a broker that does not listen: one that has not begun to, or one that is dying."""
    folder = user.runtime / "cloister"
    folder.mkdir(mode=0o700)
    descriptor = os.open(folder / "broker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def test_a_start_takes_the_lock_of_one_that_is_dying(user: User, workspace: Path, lock: int) -> None:
    """It is let go a moment later, and nobody else would start one."""
    later = threading.Timer(1.0, os.close, [lock])
    later.start()
    done = user.inside("echo began", cwd=workspace)
    later.join()
    assert (done.returncode, done.stdout) == (0, "began\n"), done.stderr


def test_a_start_does_not_wait_for_ever(user: User, workspace: Path, lock: int) -> None:
    """Whoever holds the lock and never answers is named, and nothing was started."""
    done = user.inside("echo began", cwd=workspace)
    os.close(lock)
    assert (done.returncode, done.stdout, "[broker-stuck]" in done.stderr) == (125, "", True), done.stderr
