"""What of its caller a run has, and what a caller may do: umask, arguments, closed streams, Ctrl-C at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.cloister import User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


def shell(user: User, workspace: Path, line: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run `cloister WORDS` as `"$@"` of a line of bash."""
    return subprocess.run(
        ["/bin/bash", "-c", line, "bash", *user.command(*words)], cwd=workspace, env=user.environment,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("mask", ["002", "027"])
def test_files_get_the_modes_that_the_callers_umask_gives(user: User, workspace: Path, mask: str) -> None:
    """Also those of a detached run, which the broker starts: its own umask is nobody's business."""
    line = f'umask {mask}; "$@"'
    shell(user, workspace, line, "run", "shell", "--", "touch", "attached")
    shell(user, workspace, line, "run", "--detach", "shell", "--", "touch", "detached")
    until = time.monotonic() + 20
    while not (workspace / "detached").exists() and time.monotonic() < until:
        time.sleep(0.02)
    modes = {name: (workspace / name).stat().st_mode & 0o777 for name in ("attached", "detached")}
    user.run("stop", "--all", cwd=workspace)
    user.close()

    assert modes == dict.fromkeys(("attached", "detached"), 0o666 & ~int(mask, 8))


def test_an_argument_may_hold_any_bytes(user: User, workspace: Path) -> None:
    """The agent gets them as they are; records show them escaped, and stay JSON."""
    done = subprocess.run(
        user.command("run", "shell", "--", "/usr/bin/printf", "%s|", "\udcff\udcfe", "ü", ""), cwd=workspace,
        env=user.environment, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    listed = json.loads(user.run("ps", "--all", "--json", cwd=workspace).stdout)
    receipt = json.loads(user.run("receipt", "last", "--json", cwd=workspace).stdout)
    inspected = user.run("inspect", "last", "--json", cwd=workspace)
    (begun,) = user.audited("run.started")
    user.close()

    assert (done.returncode, done.stdout) == (0, b"\xff\xfe|" + "ü||".encode())
    assert listed[0]["command"][2:] == receipt["command"][2:] == ["\\xff\\xfe", "ü", ""]
    assert inspected.returncode == 0
    assert begun


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_nothing_special(user: User, workspace: Path, closed: str) -> None:
    """No verb takes another file for it, hangs, or answers with a traceback."""
    ran = shell(user, workspace, f'"$@" {closed}', "run", "shell", "--", "/bin/sh", "-c", "cat; exit 7")
    told = shell(user, workspace, f'"$@" {closed}', "ps", "--all")
    user.close()

    assert (ran.returncode, told.returncode) == (7, 0)
    assert b"Traceback" not in ran.stdout + ran.stderr + told.stdout + told.stderr


def test_ctrl_c_while_the_broker_starts_is_for_the_caller(user: User, workspace: Path) -> None:
    """Whoever types it gets 130 and no traceback of what all runs share; the next run finds a broker."""
    process = user.start("run", "shell", "--", "true", cwd=workspace, start_new_session=True)
    until = time.monotonic() + 20
    while not (user.runtime / "cloister").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    again = user.inside("exit 3", cwd=workspace)
    user.close()

    assert process.returncode in {0, 130, -signal.SIGINT}  # 0: it was over already
    assert b"Traceback" not in err
    assert again.returncode == 3


def test_ctrl_c_at_any_moment_of_a_start_is_130(user: User, workspace: Path) -> None:
    """The signal is for all of the terminal's processes: whichever of them dies first, the caller gets one code.

    It was `workspace-changed` now and then: a sandbox that is dying cannot be looked at.
    """
    front_door = Path(sys.executable).with_name("cloister")
    assert user.inside("true", cwd=workspace).returncode == 0
    ends = []
    for moment in range(60):
        argv = [str(front_door), "run", "shell", "--", "sleep", "30"]
        process = subprocess.Popen(
            argv, cwd=workspace, env=user.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        time.sleep(moment * 0.001)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        ends.append((process.returncode, err))
    reasons = {receipt["reason"] for receipt in user.receipts()}
    user.close()

    assert {code for code, _ in ends} <= {130, -signal.SIGINT}, ends
    assert not reasons & {"workspace-changed", "sandbox-failed", "protection-lost"}
    assert reasons <= {"exited", "stopped", "client-died"}
