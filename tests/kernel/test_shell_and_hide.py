"""`cloister shell`, and paths outside the workspace that a policy shows and hides in part."""

from pathlib import Path

import pytest

from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


def test_shell_opens_a_sandbox_and_enters_a_running_one(user: User, workspace: Path) -> None:
    """With an agent's name a new sandbox, with a run's id that one; the key of the home is in neither."""
    script = b"echo here >> /tmp/mark; cat /tmp/mark; cat ~/.ssh/id_ed25519; exit 3\n"
    fresh = user.run("shell", "shell", cwd=workspace, stdin=script)
    run = user.start("run", "shell", "--", "sh", "-c", "echo first > /tmp/mark; sleep 30", cwd=workspace)
    running = user.wait_running()[0]["id"]
    entered = user.run("shell", running, cwd=workspace, stdin=script)
    user.run("stop", running, cwd=workspace)
    run.wait(20)

    assert (fresh.returncode, fresh.stdout) == (3, "here\n"), fresh.stderr
    assert (entered.returncode, entered.stdout) == (3, "first\nhere\n"), entered.stderr
    assert "No such file" in fresh.stderr
    assert "No such file" in entered.stderr
    user.close()


def test_a_path_can_be_hidden_in_what_is_shown(user: User, workspace: Path) -> None:
    """A directory of the home is shown, a file and a directory in it are masked; the rest is readable."""
    shown = user.home / "data"
    (shown / "private").mkdir(parents=True)
    for name in ("open", "token", "private/key"):
        (shown / name).write_text(f"{name}-canary\n")
    user.write_policy(BASE + 'filesystem = { read = ["~/data"], hide = ["~/data/token", "~/data/private"] }\n')
    done = user.inside("cat ~/data/open; cat ~/data/token ~/data/private/key; ls ~/data/private", cwd=workspace)

    assert done.stdout == "open-canary\n", done.stdout
    assert "canary" not in done.stderr
    assert (shown / "token").read_text() == "token-canary\n"
    user.close()
