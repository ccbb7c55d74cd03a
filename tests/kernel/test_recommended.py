"""The policies that README.md and examples/ recommend, run: only addresses and files are this test's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from support.cloister import BASE, User
from support.fake_model import FakeModel

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

ROOT = Path(__file__).parents[2]
REAL_KEY = "made-up-upstream-key-3"
REAL_TOKEN = "made-up-token-4"


def keep(user: User, name: str, text: str) -> None:
    """Store a secret where the pages say."""
    path = user.home / ".config/cloister" / name
    path.touch(mode=0o600)
    path.write_text(f"{text}\n")


def ask(path: str, model: str) -> str:
    """Return the command that calls a model with what every sandbox with models has."""
    body = json.dumps({"model": model, "max_tokens": 16, "messages": [{"role": "user", "content": "hi"}]})
    key = "Authorization: Bearer $CLOISTER_MODEL_KEY"
    return f"curl -sS -m 20 http://127.0.0.1:11435{path} -H \"{key}\" -d '{body}'"


def test_the_policy_of_the_readme(user: User, workspace: Path) -> None:
    """It starts, its agent calls its model and prints its variables: placeholders inside, the key at the model."""
    text = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    text = re.sub(r"^\[agents\.claude\.credentials\.work-key\].*?^\n", "", text, flags=re.DOTALL | re.MULTILINE)
    text = text.replace("command:gh auth token", "file:~/.config/cloister/gh.token")
    with FakeModel() as model:
        key = '"file:~/.config/cloister/anthropic.key"'
        user.write_policy(text.replace(f"key = {key}", f'base_url = "{model.url}"\nkey = {key}'))
        keep(user, "anthropic.key", REAL_KEY)
        keep(user, "gh.token", REAL_TOKEN)
        call = ask("/v1/messages", "claude-sonnet-4-5")
        done = user.run("run", "--yes", "claude", "--", "sh", "-c", f"{call}; echo; env", cwd=workspace)

        assert "FAKE-OK" in done.stdout, done.stdout + done.stderr
        assert {request.headers["x-api-key"] for request in model.requests} == {REAL_KEY}
    assert re.search(r"^GH_TOKEN=cloister-github-\w+$", done.stdout, re.MULTILINE)
    assert REAL_KEY not in done.stdout + done.stderr
    assert REAL_TOKEN not in done.stdout + done.stderr
    assert "1 call, 0 refused, 11 tokens in, 5 out" in user.run("receipt", "last", cwd=workspace).stdout
    usage = json.loads(user.run("usage", "--json", cwd=workspace).stdout)
    assert usage["total"]["requests"] == 1
    user.close()


def test_explain_knows_the_way_to_models_and_keys(user: User, workspace: Path) -> None:
    """The run's own place for models is reachable; the provider's host is not, and says that it need not be."""
    user.write_policy(
        BASE
        + '[providers.one]\nkey = "file:~/.config/cloister/one.key"\n[agents.shell.llm]\nproviders = ["one"]\n'
        + '[agents.shell.egress]\nallow = ["github.com:22"]\n'
    )
    inside = user.run("explain", "shell", "127.0.0.1:11435", cwd=workspace)
    host = user.run("explain", "shell", "api.anthropic.com", cwd=workspace)
    other = user.run("explain", "shell", "127.0.0.1:11436", cwd=workspace)

    assert inside.returncode == 0, inside
    assert "one: anthropic at https://api.anthropic.com; key file:~/.config/cloister/one.key" in inside.stdout
    assert host.returncode == 1
    assert "(provider one) and need no rule" in host.stdout
    assert "add " not in host.stdout
    assert other.returncode == 1


def test_limits_without_a_provider_are_warned_of(user: User, workspace: Path) -> None:
    """`check` says that a budget without a provider bounds nothing, and says nothing where there is one."""
    limits = "[agents.shell.llm]\ntokens_per_day = 5\n"
    user.write_policy(BASE + limits)
    without = user.run("check", cwd=workspace)
    user.write_policy(f'{BASE}[providers.one]\nkey = "file:~/one.key"\n{limits}providers = ["one"]\n')
    withal = user.run("check", cwd=workspace)

    assert "has limits for models, and no provider" in without.stdout + without.stderr
    assert "warning" not in withal.stdout + withal.stderr
    assert without.returncode == withal.returncode == 0


def test_the_example_of_a_model_on_this_machine(user: User, workspace: Path) -> None:
    """examples/policies/local-model.toml reaches the model without any key, and no other model or host."""
    text = (ROOT / "examples/policies/local-model.toml").read_text()
    with FakeModel() as model:
        user.write_policy(text.replace("http://127.0.0.1:11434", model.url))
        script = f"{ask('/v1/chat/completions', 'qwen3-coder')}; {ask('/v1/chat/completions', 'gpt-5')}"
        done = user.run("run", "--yes", "pi", "--", "sh", "-c", f"{script}; curl -sS {model.url}", cwd=workspace)

        assert "FAKE-OK" in done.stdout, done.stdout + done.stderr
        assert "the model 'gpt-5' is not allowed here" in done.stdout
        assert [request.model for request in model.requests] == ["qwen3-coder"]
        assert all("authorization" not in request.headers for request in model.requests)
    user.close()
