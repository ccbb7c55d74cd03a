"""`cloister llm`: an agent's model calls are blocked at once, for all its runs, also after a restart."""

from pathlib import Path

import pytest
from test_runs import messages, set_up

from support.cloister import User
from support.fake_model import FakeModel

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


def test_block_and_unblock(user: User, workspace: Path) -> None:
    """Refused with a reason while blocked, in new runs and after the broker is gone; then it works again."""
    with FakeModel() as model:
        set_up(user, model)
        blocked = user.run("llm", "block", "shell", "--reason", "spent enough", cwd=workspace)
        first = user.inside(messages(), cwd=workspace)
        status = user.run("llm", "status", cwd=workspace)
        unblocked = user.run("llm", "unblock", "shell", cwd=workspace)
        second = user.inside(messages(), cwd=workspace)
        again = user.run("llm", "unblock", "shell", cwd=workspace)

        assert blocked.returncode == 0, blocked.stderr
        assert "spent enough" in first.stdout
        assert "permission_error" in first.stdout
        assert "shell  spent enough" in status.stdout
        assert unblocked.returncode == 0
        assert "FAKE-OK" in second.stdout
        assert again.returncode == 64
        assert "agent-not-blocked" in again.stderr
        assert len(model.requests) == 1
        user.close()


def test_a_switch_that_cannot_be_read_is_off(user: User, workspace: Path) -> None:
    """A broken file blocks every agent, and says so."""
    with FakeModel() as model:
        set_up(user, model)
        user.state.mkdir(parents=True, exist_ok=True)
        (user.state / "blocked.json").write_text("{")
        done = user.inside(messages(), cwd=workspace)

        assert "cannot be read" in done.stdout
        assert model.requests == []
        user.close()
