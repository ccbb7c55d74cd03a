"""Somebody on the host swaps a protected path while a sandbox is set up: the start is refused, the agent never runs.

bubblewrap mounts by path, so between its mount and the look from outside another directory can take a
place. The swapper here exchanges two directories (renameat2(2), RENAME_EXCHANGE) as fast as it can.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.cloister import User

pytestmark = pytest.mark.kernel
_AT_FDCWD, _EXCHANGE = -100, 2
_STARTS = 60
_WORK = "echo planted > .git/hooks/pre-commit; echo ran"


@contextmanager
def _swapping(one: Path, other: Path) -> Iterator[None]:
    """Exchange two directories for as long as the block runs."""
    libc = ctypes.CDLL(None, use_errno=True)
    stop = threading.Event()

    def swap() -> None:
        while not stop.wait(0.0003):
            if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE):
                raise OSError(ctypes.get_errno(), "renameat2")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.usefixtures("nothing_left")
def test_a_path_swapped_while_the_sandbox_is_set_up_is_noticed(user: User, workspace: Path) -> None:
    """With hooks that are swapped all the time, some starts are refused as changed before the agent runs.

    The others end when a mount is lost (P-080), or run: then the swap came at a moment when it changed nothing.
    """
    spare = workspace / ".git/spare-hooks"
    spare.mkdir()
    assert user.inside(_WORK, cwd=workspace).stdout == "ran\n"
    refused = 0
    with _swapping(workspace / ".git/hooks", spare):
        for _ in range(_STARTS):
            done = user.inside(_WORK, cwd=workspace)
            changed = "[workspace-changed]" in done.stderr
            assert not changed or (done.returncode, done.stdout) == (125, "")
            assert changed or done.stdout == "ran\n" or "[protection-lost]" in done.stderr, done.stderr
            refused += changed
            if refused >= 2:
                break

    assert refused
    assert user.inside(_WORK, cwd=workspace).stdout == "ran\n"
    user.close()
