"""Verbs that stop something: a name that is misspelt is obeyed, and never passes for the one that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
IDENTITY = BASE + '[agents.shell.identity]\naudiences = ["vault"]\n'


def test_blocking_an_unknown_agent_is_doubted(user: User, workspace: Path) -> None:
    """`cloister llm block` names the agent that is alike, and says nothing where the name is right or none is known."""
    wrong = user.run("llm", "block", "shel", cwd=workspace)
    right = user.run("llm", "block", "shell", cwd=workspace)
    user.write_policy("broken")
    broken = user.run("llm", "block", "other", cwd=workspace)

    assert "no agent 'shel'; did you mean shell?" in wrong.stderr
    assert right.stderr == broken.stderr == ""
    assert (wrong.returncode, right.returncode, broken.returncode) == (0, 0, 0)
    assert [line.split()[0] for line in broken.stdout.splitlines()] == ["other", "shel", "shell"]


def test_revoking_what_is_not_known_is_doubted(user: User, workspace: Path) -> None:
    """`cloister identity revoke` finds a run by `last`, and says where it knows nothing of that name."""
    user.write_policy(IDENTITY)
    user.inside("true", cwd=workspace)
    known = user.run("identity", "revoke", "run", "last", cwd=workspace)
    right = user.run("identity", "revoke", "agent", "shell", cwd=workspace)
    unknown = user.run("identity", "revoke", "run", "nonsense", cwd=workspace)
    agent = user.run("identity", "revoke", "agent", "shel", cwd=workspace)

    assert known.stdout == f"revoked run {user.records()[-1]['id']}\n"
    assert known.stderr == right.stderr == ""
    assert "no run 'nonsense' is known here, see cloister ps --all" in unknown.stderr
    assert "no agent 'shel' is known here" in agent.stderr
    assert (known.returncode, unknown.returncode, agent.returncode) == (0, 0, 0)
    user.close()


def test_a_word_that_is_no_token_says_how_it_is_done(user: User, workspace: Path) -> None:
    """`cloister identity verify WORD` is refused with the command to type."""
    user.write_policy(IDENTITY)
    user.inside("true", cwd=workspace)
    done = user.run("identity", "verify", "FILE", cwd=workspace)

    assert done.returncode == 77
    assert "try: cloister identity verify - < FILE" in done.stderr
    user.close()
