"""What an agent is told and what it keeps: the note reaches the model, history is one project's, git knows its user."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.agents import AGENTS, KEY, Agent, place
from support.cloister import BASE, User
from support.fake_model import FakeModel
from support.homes import make_workspace

pytestmark = pytest.mark.agents
POLICY = """\
schema = 1

[agents.{name}]
preset = "{name}"
sandbox_note = {note}
carry = {carry}
environment = {{ {environment} }}
egress = {{ allow = ["host.cloister.internal:{port}"] }}
"""
NOTE = "You run inside a Cloister sandbox."


TOLD = [name for name in AGENTS if name != "openclaw"]
"""Agents whose presets have a way to tell them; OpenClaw takes no such argument."""


@pytest.fixture(params=[AGENTS[name] for name in TOLD], ids=TOLD)
def agent(request: pytest.FixtureRequest) -> Agent:
    """Return each agent that can be told."""
    return request.param


@pytest.fixture
def agents_on_path(agents_bin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let users find the real agents."""
    monkeypatch.setenv("CLOISTER_TEST_PATH", f"{agents_bin}:/usr/local/bin:/usr/bin:/bin")


@pytest.fixture
def claude(agents_on_path: None, home: Path, fake_model: FakeModel) -> Iterator[User]:
    """A user with Claude Code."""
    user = User(home, policy(AGENTS["claude"], home, fake_model, note=True))
    yield user
    user.close()


def policy(agent: Agent, home: Path, model: FakeModel, *, note: bool) -> str:
    """Return a policy that points the agent at the fake model."""
    setup = agent.setup(f"http://host.cloister.internal:{model.port}")
    place(setup.files, home)
    own = {name: value for name, value in setup.environment.items() if value.startswith("http") or value == KEY}
    return POLICY.format(
        name=agent.name,
        note=str(note).lower(),
        carry=[f"~/{name}" for name in setup.files if name.endswith("models.json")],
        environment=", ".join(f'{name} = "{value}"' for name, value in own.items()),
        port=model.port,
    )


def instructions(model: FakeModel) -> str:
    """Return what the model was told beside the user's words, in each protocol's place for it."""
    found: list[object] = []
    for request in model.requests:
        body = request.body
        found += [body.get("system"), body.get("instructions")]
        messages = body.get("messages") or body.get("input") or []
        found += [item for item in messages if isinstance(item, dict) and item.get("role") in {"system", "developer"}]
    return json.dumps(found)


@pytest.mark.usefixtures("nothing_left", "agents_on_path")
def test_the_note_reaches_the_model(agent: Agent, home: Path, workspace: Path, fake_model: FakeModel) -> None:
    """Its limits reach the model as a system or developer text; with `sandbox_note = false` they do not."""
    user = User(home, policy(agent, home, fake_model, note=True))
    with_note = user.run("run", *agent.command(), cwd=workspace, timeout_s=90)
    told = instructions(fake_model)
    fake_model.requests.clear()
    user.write_policy(policy(agent, home, fake_model, note=False))
    without = user.run("run", *agent.command(), cwd=workspace, timeout_s=90)
    untold = json.dumps([request.body for request in fake_model.requests])
    user.close()

    assert "FAKE-OK" in with_note.stdout, with_note.stderr
    assert "FAKE-OK" in without.stdout, without.stderr
    assert NOTE in told
    assert f"you may write below {workspace}" in told
    assert f"host.cloister.internal:{fake_model.port}" in told
    assert NOTE not in untold


@pytest.mark.usefixtures("nothing_left")
def test_history_is_the_projects(claude: User, home: Path, workspace: Path) -> None:
    """A second run sees what the first wrote below ~/.claude; a worktree shares it, another project does not."""
    other = make_workspace(home / "src" / "other")
    subprocess.run(["git", "worktree", "add", "-q", "../tree"], cwd=workspace, check=True, timeout=30)

    def inside(script: str, cwd: Path) -> str:
        return claude.inside(script, cwd=cwd, agent="claude").stdout.strip()

    inside("echo first > ~/.claude/kept; echo first > ~/gone", workspace)
    look = "cat ~/.claude/kept ~/gone 2>/dev/null; true"
    assert inside(look, workspace) == "first"
    assert inside(look, workspace.parent / "tree") == "first"
    assert inside(look, other) == ""
    inside("echo other > ~/.claude/kept", other)
    assert inside(look, workspace) == "first"
    assert not (home / ".claude/kept").exists()
    claude.close()


@pytest.mark.usefixtures("nothing_left")
def test_a_conversation_can_be_continued(claude: User, workspace: Path, fake_model: FakeModel) -> None:
    """`claude --continue` in a later run of the same project finds the conversation of an earlier one."""
    argv = AGENTS["claude"].argv
    first = claude.run("run", *argv, "the first question", cwd=workspace, timeout_s=90)
    second = claude.run("run", *argv, "--continue", "the second question", cwd=workspace, timeout_s=90)

    assert "FAKE-OK" in first.stdout, first.stderr
    assert "FAKE-OK" in second.stdout, second.stderr
    assert "the first question" in json.dumps(fake_model.requests[-1].body)
    claude.close()


@pytest.mark.usefixtures("nothing_left")
def test_git_knows_its_user(home: Path, workspace: Path) -> None:
    """The commit's author is the user's; safe.directory comes in; nothing through which git runs a program does."""
    config = home / ".gitconfig"
    config.write_text(
        config.read_text()
        + "[safe]\n\tdirectory = /somewhere/shared\n[alias]\n\tevil = !touch evil\n[core]\n\tpager = evil\n"
    )
    user = User(home)
    script = (
        "echo x > f; git add f; git commit -qm work; git log -1 --format='%an <%ae> %cn'; git config safe.directory; "
        "git config alias.evil; git config core.pager; git config user.email"
    )
    done = user.inside(script, cwd=workspace)
    user.write_policy(BASE + "git_identity = false\n")
    without = user.inside("git config user.email; git config safe.directory; echo none", cwd=workspace)
    user.close()

    assert done.stdout.splitlines() == ["Dev <dev@example.org> Dev", "/somewhere/shared", "dev@example.org"], (
        done.stderr
    )
    assert without.stdout == "none\n"
