"""The real agents through the inference proxy: presets alone point them there, and the real key stays outside."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.agents import AGENTS, MODEL, Agent
from support.cloister import User
from support.fake_model import FakeModel
from support.model_wire import INPUT_TOKENS, OUTPUT_TOKENS, Run, Say

pytestmark = pytest.mark.agents
REAL_KEY = "made-up-upstream-key-2"

POLICY = """\
schema = 1

[providers.fake]
protocol = "{protocol}"
base_url = "{url}"
key = "file:~/.config/cloister/model.key"

[agents.{name}]
preset = "{name}"
egress = {{ preset_hosts = false }}
environment_audit = false

[agents.{name}.llm]
providers = ["fake"]
models=["fake-1","claude-*"]
"""
PROTOCOLS = {"openclaw": "anthropic", "claude": "anthropic", "pi": "anthropic", "codex": "openai-responses"}
ARGUMENTS = {
    "openclaw": ("agent", "--local", "--session-id", "one", "--message"),
    "claude": ("--dangerously-skip-permissions", "-p"),
    "pi": ("-p", "--provider", "anthropic", "--model", "claude-sonnet-4-5"),
    "codex": ("exec", "--skip-git-repo-check", "-m", MODEL),
}


@pytest.fixture(params=AGENTS.values(), ids=AGENTS.keys())
def agent(request: pytest.FixtureRequest) -> Agent:
    """Return each agent in turn."""
    return request.param


@pytest.fixture
def user(
    agent: Agent, agents_bin: Path, home: Path, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> Iterator[User]:
    """A user whose agent has a provider, and no host at all."""
    monkeypatch.setenv("CLOISTER_TEST_PATH", f"{agents_bin}:/usr/local/bin:/usr/bin:/bin")
    user = User(home, POLICY.format(name=agent.name, protocol=PROTOCOLS[agent.name], url=fake_model.url))
    key = home / ".config/cloister/model.key"
    key.write_text(f"{REAL_KEY}\n")
    key.chmod(0o600)
    yield user
    user.close()


def test_it_works_with_its_preset_and_no_key(agent: Agent, user: User, workspace: Path, fake_model: FakeModel) -> None:
    """Unmodified, no host allowed: it runs a command and answers; its key opens nothing but its own way to the proxy.

    The upstream saw the real key and no placeholder, the tool saw the placeholder and no real key, and the ledger has
    one row for each request that the upstream counted, with the upstream's tokens.
    """
    fake_model.script = (Run("env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'"), Say("ALL-DONE"))
    done = user.run("run", agent.name, *ARGUMENTS[agent.name], "hi", cwd=workspace, timeout_s=100)

    assert "ALL-DONE" in done.stdout, done.stdout + done.stderr + str([one.path for one in fake_model.requests])
    calls = [one for one in fake_model.requests if one.method == "POST"]
    sent = {one.headers.get("x-api-key") or one.headers.get("authorization") for one in calls}
    assert sent == {REAL_KEY if PROTOCOLS[agent.name] == "anthropic" else f"Bearer {REAL_KEY}"}
    seen = "\n".join(fake_model.tool_results)
    assert "CLOISTER_RUN=" in seen
    assert "cloister-" in seen or agent.name == "codex", seen  # which keeps keys from its tools
    assert REAL_KEY not in seen + done.stdout + done.stderr
    user.close()
    ledger = sqlite3.connect(f"file:{user.state}/ledger/ledger.db?mode=ro", uri=True)
    rows = ledger.execute(
        "select input_tokens, output_tokens, source, outcome from calls where status = 200 and outcome <> 'refused' "
        "and route in ('messages', 'responses')"
    ).fetchall()
    counted = [one for one in calls if not one.path.partition("?")[0].endswith("count_tokens")]
    assert rows == [(INPUT_TOKENS, OUTPUT_TOKENS, "provider", "complete")] * len(counted)
