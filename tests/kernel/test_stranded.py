"""A bubblewrap whose parent is killed before it was told to go on: it would wait for ever, and is found and ended."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cloister.host.stranded import end_stranded

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
RUN = "0123456789ab"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not _alive(pid)


def test_a_child_of_bubblewrap_that_nobody_tells_to_go_on_is_ended() -> None:
    """Its parent is killed between its clone and its word to the child: the child stays, until it is found."""
    told, tell = os.pipe()
    held, _hold = os.pipe()
    bwrap = shutil.which("bwrap") or "bwrap"
    argv = [bwrap, "--unshare-user", "--unshare-pid", "--die-with-parent", "--info-fd", str(tell)]
    argv += ["--userns-block-fd", str(held), "--ro-bind", "/", "/", "--setenv", "RUN", RUN, "sleep", "300"]
    with subprocess.Popen(argv, pass_fds=(tell, held)) as parent:
        os.close(tell)
        assert b"child-pid" in os.read(told, 4096)
        words = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        child = int(words[0])
        parent.kill()
        parent.wait()
    for descriptor in (told, held, _hold):
        os.close(descriptor)
    time.sleep(0.3)

    assert _alive(child), "or there is nothing to mend"
    assert end_stranded("ba9876543210", argv) == 0
    assert end_stranded(RUN, [*argv, "more"]) == 0
    assert _alive(child)
    assert end_stranded(RUN, argv) == 1
    assert _gone(child)


def test_a_dying_outer_half_is_waited_for_and_a_living_one_not_for_long() -> None:
    """What follows its end is found as well: the look comes when it has ended, or after a second."""
    argv = ["sh", "-c", "read line", RUN]
    with subprocess.Popen(["sleep", "0.3"]) as outer, subprocess.Popen(argv, stdin=subprocess.PIPE) as left:
        began = time.monotonic()
        assert end_stranded(RUN, argv, outer.pid) == 1
        assert time.monotonic() - began > 0.2
        assert left.wait(10) == -signal.SIGKILL
        began = time.monotonic()
        assert end_stranded(RUN, argv, os.getpid()) == 0
        assert 0.9 < time.monotonic() - began < 5


def test_others_are_left_alone() -> None:
    """Without the run's id in it a command line says too little, and one that only begins alike is another."""
    words = ["sleep", "300.0123"]
    with subprocess.Popen(words) as other:
        assert end_stranded(RUN, words) == 0
        assert end_stranded("", words) == 0
        assert end_stranded("300.0", ["sleep", "300.01234"]) == 0
        assert other.poll() is None
        other.send_signal(signal.SIGKILL)
