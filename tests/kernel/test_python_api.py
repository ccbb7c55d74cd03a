"""The Python API, as a program of a person uses it: one sandbox, many commands, one receipt."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
WARM = """\
import sys
from cloister import Sandbox
with Sandbox("shell", directory=".") as box:
    done = box.run(["sh", "-c", "cat; echo e >&2; cat ~/.ssh/id_ed25519; echo x > /tmp/kept; exit 3"], input=b"hi")
    assert (done.returncode, done.stdout[:2], done.stderr[:2]) == (3, b"hi", b"e\\n"), done
    assert b"No such file" in done.stderr, done
    assert box.run(["cat", "/tmp/kept"]).stdout == b"x\\n"
print(box.run_id)
"""
REFUSED = """\
from cloister import Sandbox
from cloister.errors import CloisterError
try:
    Sandbox("shell", directory=".")
except CloisterError as error:
    print(error.reference)
"""


def _python(user: User, workspace: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=workspace, env=user.environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def test_commands_run_warm_in_one_sandbox(user: User, workspace: Path) -> None:
    """Input, both outputs and the exit code arrive; `/tmp` is kept between commands; the home's key is not there."""
    done = _python(user, workspace, WARM)

    assert done.returncode == 0, done.stderr
    assert [receipt["id"] for receipt in user.receipts()] == [done.stdout.strip()]
    user.close()


def test_a_sandbox_that_may_not_start_is_an_error(user: User, workspace: Path) -> None:
    """A policy that asks for what nothing enforces raises, and hangs nobody."""
    user.write_policy(BASE + 'isolation = "unit"\n')

    assert _python(user, workspace, REFUSED).stdout == "sandbox-not-started\n"
    user.close()


def test_exec_into_a_run_that_starts_does_not_harm_it(user: User, workspace: Path) -> None:
    """A command for a run that is not up yet is refused by name, and the run goes on."""
    run = user.start("run", "shell", "--", "sleep", "1", cwd=workspace)
    while run.poll() is None:
        early = user.run("exec", "last", "--", "true", cwd=workspace)
        known = ("run-starting", "run-not-alive", "run-ended")
        assert early.returncode == 0 or any(reference in early.stderr for reference in known), early

    assert run.returncode == 0
    user.close()
