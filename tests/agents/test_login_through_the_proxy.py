"""Claude Code through the inference proxy with a provider whose key is a login that only the broker holds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cloister.credentials import logins as kept_logins
from cloister.credentials.oauth_answers import read_token_answer
from cloister.host.logins import Shelf
from cloister.policy.presets import builtin_preset
from support.cloister import User
from support.fake_model import FakeModel
from support.fake_oauth import FakeOauth
from support.model_wire import Run, Say

pytestmark = pytest.mark.agents
POLICY = """\
schema = 1

[providers.signed-in]
base_url = "{url}"
key = "login:work"

[agents.claude]
preset = "claude"
egress = {{ preset_hosts = false }}
environment_audit = false

[agents.claude.llm]
providers = ["signed-in"]
"""


def log_in(user: User, provider: FakeOauth) -> None:
    """Store a login that is due, with what the preset says that requests with it need."""
    now = time.time() - 3550
    own = builtin_preset("claude").login
    assert own
    login = provider.login(hosts=("127.0.0.1",), headers=own.headers)
    granted = read_token_answer(200, json.dumps(provider.grant()).encode(), now)
    kept = kept_logins.renewed(kept_logins.new("work", "claude", login, granted, now), granted, now, forced=False)
    with Shelf(str(user.state / "logins")).held("work") as held:
        held.write(kept_logins.encode(kept))


@pytest.mark.usefixtures("nothing_left")
def test_claude_works_on_a_login_as_the_providers_key(
    agents_bin: Path, home: Path, workspace: Path, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs a command and answers; upstream: access tokens and its betas with the login's; inside: a placeholder."""
    monkeypatch.setenv("CLOISTER_TEST_PATH", f"{agents_bin}:/usr/local/bin:/usr/bin:/bin")
    fake_model.script = (Run("env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'"), Say("ALL-DONE"))
    user = User(home, POLICY.format(url=fake_model.url))
    with FakeOauth() as provider:
        log_in(user, provider)
        done = user.run(
            "run", "claude", "--dangerously-skip-permissions", "-p", "hi", cwd=workspace, timeout_s=100
        )  # fmt: skip
        user.close()
        access = {f"Bearer {token}" for family in provider.families for token in family.access}
        secret = [token for family in provider.families for token in (*family.access, family.refresh)]
        renewals = provider.renewals()

    assert "ALL-DONE" in done.stdout, done.stdout + done.stderr + str([one.path for one in fake_model.requests])
    calls = [one for one in fake_model.requests if one.method == "POST"]
    assert calls
    assert {one.headers.get("authorization") for one in calls} <= access
    assert not [one for one in calls if "x-api-key" in one.headers]
    betas = [one.headers["anthropic-beta"].split(",") for one in calls]
    assert all(one.count("oauth-2025-04-20") == 1 for one in betas)
    assert any(len(one) > 1 for one in betas)  # Claude Code's own are there as well
    seen = "\n".join(fake_model.tool_results) + done.stdout + done.stderr
    assert "CLOISTER_RUN=" in seen
    assert "cloister-" in seen
    assert not [token for token in secret if token in seen]
    assert renewals == 1
