"""Root's limits: scopes of the system's manager."""

from pathlib import Path

import pytest
from test_limits_in_force import DIES, LIMITED, PYTHON, settled

from support.cloister import User

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.root]


def test_the_systems_manager_limits_root(user: User, workspace: Path) -> None:
    """What rlimits could not do for root, a scope does; and nothing stays."""
    user.write_policy(LIMITED + 'memory_max = "128M"\ntasks_max = 30\ncpu_quota = "100%"\n')
    memory = user.run("run", "shell", "--", PYTHON, "-c", DIES, "77", "77", cwd=workspace)
    tasks = user.inside("for i in $(seq 60); do sleep 5 & done", cwd=workspace)

    assert memory.stdout == "[0, 9]\n", memory.stderr
    assert "tasks_max was reached" in tasks.stderr
    assert "tasks_max 30: cgroup (systemd scope)" in user.receipts()[-1]["limits"]
    assert settled() == []
    user.close()
