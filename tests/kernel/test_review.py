"""Overlay mode from the command line: run, diff, apply, discard, on a real overlay."""

import json
from pathlib import Path

import pytest

from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
OVERLAY = BASE + '[agents.shell.workspace]\nmode = "overlay"\n'


def test_diff_shows_and_apply_writes(user: User, workspace: Path) -> None:
    """What the run changed is shown, nothing is written until told, and then exactly that."""
    user.write_policy(OVERLAY)
    (workspace / "old").write_text("to go\n")
    script = "echo changed > README; echo new > made; rm old; mkdir -p d; ln -s ../README d/link"
    user.inside(f"{script}; touch -d @1234567890.5 made", cwd=workspace)
    shown = user.run("diff", "last", "--json", cwd=workspace)
    text = user.run("diff", "last", cwd=workspace)
    before = (workspace / "README").read_text()
    applied = user.run("apply", "last", cwd=workspace)

    assert {(one["path"], one["op"]) for one in json.loads(shown.stdout)} == {
        ("README", "modified"), ("made", "added"), ("old", "deleted"), ("d", "added"), ("d/link", "added"),
    }  # fmt: skip
    assert "-a project" in text.stdout
    assert "+changed" in text.stdout
    assert before == "a project\n"
    assert applied.returncode == 0, applied.stderr
    assert (workspace / "README").read_text() == "changed\n"
    assert ((workspace / "made").read_text(), (workspace / "made").stat().st_mtime) == ("new\n", 1234567890.5)
    assert (workspace / "d/link").readlink() == Path("../README")
    assert not (workspace / "old").exists()
    assert "overlay-gone" in user.run("apply", "last", cwd=workspace).stderr
    user.close()


def test_apply_refuses_what_would_run_on_the_host(user: User, workspace: Path) -> None:
    """Hooks, editor tasks and links that lead out are refused; the rest of the same run is applied."""
    user.write_policy(OVERLAY)
    user.inside(
        "echo x > .git/hooks/post-checkout; mkdir .vscode; echo x > .vscode/tasks.json; "
        "ln -s /etc/passwd out; ln -s /usr/bin/env program; echo y > fine",
        cwd=workspace,
    )
    applied = user.run("apply", "last", cwd=workspace)

    assert applied.returncode == 1
    assert not (workspace / ".git/hooks/post-checkout").exists()
    assert not (workspace / ".vscode/tasks.json").exists()
    assert not (workspace / "out").is_symlink()
    assert (workspace / "program").is_symlink()  # nobody writes there but root
    assert (workspace / "fine").read_text() == "y\n"
    user.close()


def test_apply_never_follows_a_link_put_in_its_way(user: User, home: Path, workspace: Path) -> None:
    """A directory that became a link after the run is not written through."""
    user.write_policy(OVERLAY)
    (workspace / "sub").mkdir()
    user.inside("echo stolen > sub/file", cwd=workspace)
    (workspace / "sub").rmdir()
    outside = home / "outside"
    outside.mkdir()
    (workspace / "sub").symlink_to(outside)
    refused = user.run("apply", "last", cwd=workspace)
    user.run("apply", "last", "--force", cwd=workspace)

    assert refused.returncode == 1
    assert list(outside.iterdir()) == []
    assert not (workspace / "sub").is_symlink()
    assert (workspace / "sub/file").read_text() == "stolen\n"
    user.close()


def test_a_conflict_is_refused_unless_forced(user: User, workspace: Path) -> None:
    """What the person changed since the run began is not overwritten without being asked."""
    user.write_policy(OVERLAY)
    user.inside("echo agent > README", cwd=workspace)
    (workspace / "README").write_text("mine\n")
    refused = user.run("apply", "last", cwd=workspace)
    kept = (workspace / "README").read_text()
    forced = user.run("apply", "last", "--force", cwd=workspace)

    assert (refused.returncode, kept) == (1, "mine\n")
    assert forced.returncode == 0
    assert (workspace / "README").read_text() == "agent\n"
    user.close()


def test_chosen_paths_and_discard(user: User, workspace: Path) -> None:
    """Only named paths are applied; the rest goes with discard, and the workspace stays."""
    user.write_policy(OVERLAY)
    user.inside("mkdir a b; echo 1 > a/x; echo 2 > b/y", cwd=workspace)
    chosen = user.run("apply", "last", "a", cwd=workspace)
    wrong = user.run("apply", "last", "nothing", cwd=workspace)
    gone = user.run("discard", "last", cwd=workspace)

    assert chosen.returncode == 0, chosen.stderr
    assert (workspace / "a/x").read_text() == "1\n"
    assert not (workspace / "b").exists()
    assert wrong.returncode == 64
    assert gone.returncode == 0
    assert not list(user.state.glob("runs/*/overlay"))
    user.close()


def test_direct_runs_have_nothing_to_review(user: User, workspace: Path) -> None:
    """Asking for the changes of a direct run says what kind of run it was."""
    user.inside("true", cwd=workspace)

    assert "run-not-overlay" in user.run("diff", "last", cwd=workspace).stderr
    user.close()
