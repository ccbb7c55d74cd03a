"""The program `cloister` as it is installed: the static front door, and Python where it must be."""

from __future__ import annotations

import os
import pty
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shim_build import shim
from support.cloister import User

pytestmark = pytest.mark.kernel


@pytest.fixture
def front_door(tmp_path: Path) -> Path:
    """The helper under its installed name, beside a script such as an installer writes; it notes that it ran."""
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(shim(), folder / "cloister")
    script = folder / "cloister-python"
    script.write_text(f'#!/bin/sh\necho x >>"{tmp_path}/python"\nexec {sys.executable} -m cloister "$@"\n')
    script.chmod(0o755)
    return folder / "cloister"


def pythons(front_door: Path) -> int:
    """Return how often the script ran."""
    notes = front_door.parent.parent / "python"
    return len(notes.read_text().splitlines()) if notes.exists() else 0


def run(user: User, front_door: Path, *words: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the front door."""
    return subprocess.run(
        [front_door, *words], cwd=cwd, env={**user.environment, **extra}, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def test_python_runs_only_while_no_broker_does(user: User, front_door: Path, workspace: Path) -> None:
    """The first run goes through Python, which starts the broker; the second is the static program alone."""
    for expected in (1, 1):
        done = run(
            user, front_door, "run", "shell", "--", "/bin/sh", "-c", "echo out; echo err >&2; exit 7", cwd=workspace
        )
        said = done.stderr.removeprefix("cloister: starting the broker\n")  # where that takes a second
        assert (done.stdout, said, done.returncode) == ("out\n", "err\n", 7)
        assert pythons(front_door) == expected


def test_words_directory_and_environment_arrive_unchanged(user: User, front_door: Path, workspace: Path) -> None:
    """Odd words, a relative directory and a variable asked for mean the same with and without Python."""
    (workspace / "sub").mkdir()
    odd = ["-C", "sub", "-e", "EXTRA", "shell", "--", "/bin/sh", "-c", 'pwd; echo "$EXTRA"; printf "<%s>" "$@"', "sh",
           "", "a b", "--help", "\nü"]  # fmt: skip
    answers = [run(user, front_door, "run", *odd, cwd=workspace, EXTRA="carried") for _ in range(2)]
    assert answers[0].stdout == answers[1].stdout == f"{workspace}/sub\ncarried\n<><a b><--help><\nü>"
    assert pythons(front_door) == 1


def test_help_and_other_verbs_are_pythons(user: User, front_door: Path, workspace: Path) -> None:
    """Also while a broker answers: `run --help` is declined by it, `ps` is never sent."""
    run(user, front_door, "run", "shell", "--", "true", cwd=workspace)
    for words, shown in ((["run", "--help"], "usage: cloister run"), (["--version"], "cloister "), (["ps"], "")):
        before = pythons(front_door)
        done = run(user, front_door, *words, cwd=workspace)
        assert (done.returncode, shown in done.stdout, pythons(front_door)) == (0, True, before + 1), done.stderr


def test_wrong_words_end_with_125_and_say_so(user: User, front_door: Path, workspace: Path) -> None:
    """With a broker as without one."""
    for _ in range(2):
        done = run(user, front_door, "run", "--nonsense", "shell", cwd=workspace)
        assert (done.returncode, "[option-unknown]" in done.stderr) == (125, True)
        run(user, front_door, "run", "shell", "--", "true", cwd=workspace)


def test_exec_reaches_a_running_sandbox(user: User, front_door: Path, workspace: Path) -> None:
    """`exec` takes the same door, and its exit code comes back."""
    run(user, front_door, "run", "-d", "shell", "--", "sleep", "60", cwd=workspace)
    user.wait_running()
    before = pythons(front_door)
    done = run(user, front_door, "exec", "last", "--", "/bin/sh", "-c", "echo in; exit 3", cwd=workspace)
    assert (done.stdout, done.returncode, pythons(front_door)) == ("in\n", 3, before), done.stderr
    user.run("stop", "last", cwd=workspace)


def test_a_terminal_is_found_on_the_front_door(user: User, front_door: Path, workspace: Path) -> None:
    """On a terminal the agent gets one of its own; with pipes it does not."""
    run(user, front_door, "run", "shell", "--", "true", cwd=workspace)
    main, side = pty.openpty()
    argv = [front_door, "run", "-y", "shell", "--", "/bin/sh", "-c", "test -t 0 && test -t 1"]
    done = subprocess.run(argv, cwd=workspace, env=user.environment, stdin=side, stdout=side, timeout=60, check=False)
    os.close(side)
    os.close(main)
    assert done.returncode == 0
    assert run(user, front_door, "run", "shell", "--", "test", "-t", "0", cwd=workspace).returncode == 1


def test_a_broker_that_hangs_up_is_reported_and_not_run_around(user: User, front_door: Path, workspace: Path) -> None:
    """A broker that took the request and died may have started something: nothing is started a second time."""
    folder = user.runtime / "cloister"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "broker.sock"))
        listener.listen()
        process = subprocess.Popen(
            [front_door, "run", "shell", "--", "true"], cwd=workspace, env=user.environment,
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        taken, _ = listener.accept()
        taken.recv(65536)
        taken.close()
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, "[broker-gone]" in errors, pythons(front_door)) == (125, True, 0)
