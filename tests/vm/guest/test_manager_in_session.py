"""The systemd manager of a login session, when it does not do its part."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from test_limits_in_force import LIMITED, settled

from support.cloister import User

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]


def test_a_manager_that_does_not_answer_means_no_start(user: User, workspace: Path) -> None:
    """Limits that cannot be put in force stop the start; the agent never ran, and the next one works."""
    user.write_policy(LIMITED + "tasks_max = 50\n")
    assert user.inside("true", cwd=workspace).returncode == 0
    manager = int(
        subprocess.run(
            ["systemctl", "show", "-P", "MainPID", f"user@{os.getuid()}.service"],
            capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    os.kill(manager, signal.SIGSTOP)
    try:
        refused = user.inside("touch ran", cwd=workspace)
    finally:
        os.kill(manager, signal.SIGCONT)

    assert refused.returncode == 125
    assert "limits-failed" in refused.stderr
    assert not (workspace / "ran").exists()
    assert user.inside("touch ran", cwd=workspace).returncode == 0
    assert settled() == []
    user.close()
