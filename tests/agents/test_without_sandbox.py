"""The real agents against the fake provider, without a sandbox: the positive twin of every test with one.

When these fail, an agent or the fake provider changed, not Cloister.
"""

import subprocess
from pathlib import Path

import pytest

from support.agents import AGENTS, KEY, Agent, place
from support.fake_model import FakeModel
from support.model_wire import Run, Say

pytestmark = pytest.mark.agents


@pytest.fixture(params=AGENTS.values(), ids=AGENTS.keys())
def agent(request: pytest.FixtureRequest) -> Agent:
    """Return each agent in turn."""
    return request.param


def _run(
    argv: list[str], bin_folder: Path, home: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run an agent with nothing but its own environment."""
    folder = home / "work"
    folder.mkdir()
    path = f"{bin_folder}:/usr/bin:/bin"
    return subprocess.run(
        argv,
        cwd=folder,
        env={"HOME": str(home), "PATH": path, "TERM": "dumb", "LANG": "C.UTF-8", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_pinned_version_is_installed(agent: Agent, agents_bin: Path, tmp_path: Path) -> None:
    """Each agent starts and is the version that the lock file names."""
    done = _run([agent.name, "--version"], agents_bin, tmp_path, {})

    assert agent.version in done.stdout + done.stderr


SLOWEST = "openclaw"
"""It needs a quarter of a minute to answer; `make test` has it run a command, which says as much."""


@pytest.mark.parametrize(
    "agent",
    [pytest.param(one, marks=pytest.mark.slow if name == SLOWEST else ()) for name, one in AGENTS.items()],
    ids=AGENTS.keys(),
)
def test_the_agent_answers_through_the_fake_provider(
    agent: Agent, agents_bin: Path, tmp_path: Path, fake_model: FakeModel
) -> None:
    """Each agent prints the model's answer, and presents the key it was given."""
    setup = agent.setup(fake_model.url)
    place(setup.files, tmp_path)

    done = _run(agent.command(), agents_bin, tmp_path, setup.environment)

    assert "FAKE-OK" in done.stdout, done.stderr
    assert done.returncode == 0
    assert KEY in fake_model.requests[-1].headers[agent.key_header]


def test_the_agent_runs_the_commands_it_is_told(
    agent: Agent, agents_bin: Path, tmp_path: Path, fake_model: FakeModel
) -> None:
    """Each agent runs a command for the model, and the provider sees what it printed: so attacks can be scripted."""
    fake_model.script = (Run("echo $((6*7)) > made; cat made"), Run("cat /nonexistent"), Say("DONE"))
    setup = agent.setup(fake_model.url)
    place(setup.files, tmp_path)

    done = _run(agent.command(), agents_bin, tmp_path, setup.environment)

    assert "DONE" in done.stdout, done.stderr
    assert (tmp_path / "work" / "made").read_text() == "42\n"
    first, second = fake_model.tool_results
    assert "42" in first
    assert "No such file" in second
