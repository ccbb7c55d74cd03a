"""A guest whose memory has run out: its greediest process ends, and the guest goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.guest_user import GuestUser, Installs
from support.homes import make_home, make_workspace

GREEDY = "head -c 2G /dev/zero | tail -c 2G >/dev/null; echo memory $?"
"""`tail` keeps what it may still have to print. Where it has taken all memory, one time in three everybody waits for
pages of programs, by allocations for which Linux 6.1 ends nobody."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("times", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_guest_without_memory_ends_a_process_and_goes_on(image: Installs, tmp_path: Path, times: int) -> None:
    """Again and again: who takes all memory is killed, what it was started by is told, and other commands work."""
    user = GuestUser(make_home(tmp_path / "home"), image)
    workspace = make_workspace(user.home / "src/project")
    try:
        run = user.begin(cwd=workspace)
        ended = [user.exec(run, GREEDY, cwd=workspace).stdout for _ in range(times)]
        fits = user.exec(run, "head -c 100M /dev/zero | tail -c 100M | wc -c", cwd=workspace)
        console = user.run("vm", "console", run, cwd=workspace).stdout
    finally:
        user.close()

    assert ended == ["memory 137\n"] * times
    assert fits.stdout.strip() == str(100 << 20), fits.stderr
    assert console.count("Out of memory: Killed process") >= times
    assert console.count("Manual OOM execution") == console.count("its greediest process is ended")
