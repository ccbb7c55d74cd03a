"""Model calls from inside a real sandbox: a placeholder inside, the real key upstream, one count on both sides."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from support.cloister import BASE, User
from support.fake_model import FakeModel
from support.model_wire import INPUT_TOKENS, OUTPUT_TOKENS

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

REAL_KEY = "made-up-upstream-key-1"
CURL = "curl -sS -m 20"


def policy(model: FakeModel, limits: str = "") -> str:
    """Return a policy for the agent `shell` with both protocols at a fake upstream."""
    providers = "".join(
        f'[providers.{name}]\nprotocol = "{protocol}"\nbase_url = "{model.url}"\n'
        'key = "file:~/.config/cloister/model.key"\n'
        for name, protocol in (("one", "anthropic"), ("two", "openai-responses"))
    )
    return f'{BASE}{providers}[agents.shell.llm]\nproviders = ["one", "two"]\n{limits}'


def set_up(user: User, model: FakeModel, limits: str = "", key: str = REAL_KEY) -> None:
    """Write policy and key."""
    user.write_policy(policy(model, limits))
    path = user.home / ".config/cloister/model.key"
    path.write_text(f"{key}\n")
    path.chmod(0o600)


def messages(stream: str = "false", tokens: int = 16) -> str:
    """Return the command that asks by Messages."""
    body = {"model": "claude-sonnet-4-5", "max_tokens": tokens, "messages": [{"role": "user", "content": "hi"}]}
    text = json.dumps(body)[:-1] + f', "stream": {stream}}}'
    return f'{CURL} "$ANTHROPIC_BASE_URL/v1/messages" -H "x-api-key: $ANTHROPIC_API_KEY" -d \'{text}\''


def rows(user: User) -> list[dict[str, object]]:
    """Return the ledger's rows, once the books are closed."""
    import sqlite3

    user.close()
    connection = sqlite3.connect(f"file:{user.state}/ledger/ledger.db?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    return [dict(row) for row in connection.execute("select * from calls order by id")]


def test_an_agent_calls_a_model_without_its_key(user: User, workspace: Path) -> None:
    """Placeholder inside and at the proxy, the real key upstream only; the ledger has the upstream's count."""
    with FakeModel() as model:
        set_up(user, model)
        done = user.inside(f"{messages()}; echo; {messages('true')}; env", cwd=workspace)

        assert done.stdout.count("FAKE-OK") == 2, done.stdout + done.stderr
        assert "message_stop" in done.stdout
        assert REAL_KEY not in done.stdout + done.stderr
        assert {request.headers["x-api-key"] for request in model.requests} == {REAL_KEY}
    found = rows(user)
    assert [(row["input_tokens"], row["output_tokens"], row["source"]) for row in found] == [
        (INPUT_TOKENS, OUTPUT_TOKENS, "provider")
    ] * 2
    assert {row["agent"] for row in found} == {"shell"}
    assert {row["outcome"] for row in found} == {"complete"}
    called = user.audited("model.called")
    assert [one["details"]["call"] for one in called] == [row["id"] for row in found]
    assert {one["model"]["tokens"] for one in called} == {INPUT_TOKENS + OUTPUT_TOKENS}
    assert REAL_KEY not in json.dumps(called)


@pytest.mark.parametrize("redact", [False, True])
def test_a_prompt_may_hold_placeholders(user: User, workspace: Path, redact: bool) -> None:
    """An agent that printed its environment goes on: placeholders pass, or are taken out with secrets."""
    with FakeModel() as model:
        set_up(user, model, f"redact_secrets = {str(redact).lower()}\n")
        table = (
            '[agents.shell.credentials.github]\nsecret = "file:~/.config/cloister/model.key"\nenv = "GITHUB_TOKEN"\n'
            'inject = { host = "api.github.com", scheme = "bearer" }\n'
        )
        user.write_policy(policy(model, f"redact_secrets = {str(redact).lower()}\n") + table)
        ask = messages().replace('"content": "hi"', '"content": "\'"A=$GITHUB_TOKEN B=$ANTHROPIC_API_KEY"\'"')
        done = user.inside(f"{ask}; echo; {ask}; echo; echo $GITHUB_TOKEN $ANTHROPIC_API_KEY", cwd=workspace)

        assert done.stdout.count("FAKE-OK") == 2, done.stdout + done.stderr
        github, key = done.stdout.splitlines()[-1].split()
        assert github.startswith("cloister-github-")
        content = "A=[redacted] B=[redacted]" if redact else f"A={github} B={key}"
        assert [request.body["messages"][0]["content"] for request in model.requests] == [content] * 2
        assert {request.headers["x-api-key"] for request in model.requests} == {REAL_KEY}
    user.close()


def test_both_protocols_of_openai_work_inside(user: User, workspace: Path) -> None:
    """Chat Completions and Responses, through the variables that OpenAI's own libraries read."""
    with FakeModel() as model:
        set_up(user, model)
        chat = '{"model": "gpt-5", "messages": [{"role": "user", "content": "hi"}], "stream": true}'
        more = '{"model": "gpt-5", "input": "hi", "stream": true}'
        ask = f'{CURL} -H "Authorization: Bearer $OPENAI_API_KEY" "$OPENAI_BASE_URL/'
        done = user.inside(f"{ask}chat/completions\" -d '{chat}'; {ask}responses\" -d '{more}'", cwd=workspace)

        assert "[DONE]" in done.stdout, done.stdout + done.stderr
        assert "response.completed" in done.stdout
        assert {request.headers["authorization"] for request in model.requests} == {f"Bearer {REAL_KEY}"}
        user.close()


def test_a_budget_ends_the_calls_of_all_runs(user: User, workspace: Path) -> None:
    """What one run used is missing in the next, also after the broker was restarted; a refusal says why and when."""
    with FakeModel() as model:
        set_up(user, model, f"tokens_per_day = {INPUT_TOKENS + OUTPUT_TOKENS + 70}\n")
        first = user.inside(messages(), cwd=workspace)
        user_runtime = user.runtime
        pid = user.broker_pid
        second = user.inside(messages("false", 60), cwd=workspace)

        assert "FAKE-OK" in first.stdout, first.stdout + first.stderr
        assert "budget" in second.stdout
        assert "rate_limit_error" in second.stdout
        assert len(model.requests) == 1
        subprocess.run(["kill", str(pid)], check=True)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        third = user.inside(messages("false", 60), cwd=workspace)

        assert user.runtime == user_runtime
        assert "rate_limit_error" in third.stdout
        assert len(model.requests) == 1
        user.close()


def test_a_reload_changes_the_limits_of_living_runs(user: User, workspace: Path) -> None:
    """`policy reload` refuses a model that was allowed when the run began."""
    with FakeModel() as model:
        set_up(user, model)
        script = f"{messages()}; touch first; while ! test -e go; do sleep 0.05; done; {messages()}"
        run = user.start("run", "shell", "--", "/bin/sh", "-c", script, cwd=workspace)
        deadline = time.monotonic() + 20
        while not (workspace / "first").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        set_up(user, model, 'models = ["other-*"]\n')
        reloaded = user.run("policy", "reload", cwd=workspace)
        (workspace / "go").touch()
        out, err = run.communicate(timeout=30)

        assert reloaded.returncode == 0, reloaded.stderr
        assert out.count(b"FAKE-OK") == 1, out + err
        assert b"is not allowed here" in out
        user.close()


def test_the_placeholder_of_one_run_opens_nothing_else(user: User, workspace: Path) -> None:
    """A key of another run, or none, is refused, and nothing reaches the upstream."""
    with FakeModel() as model:
        set_up(user, model)
        first = user.inside("echo $ANTHROPIC_API_KEY", cwd=workspace).stdout.strip()
        attempt = messages().replace("$ANTHROPIC_API_KEY", first)
        done = user.inside(attempt, cwd=workspace)

        assert first.startswith("cloister-")
        assert "authentication_error" in done.stdout
        assert model.requests == []
        user.close()


def test_a_real_key_in_the_callers_environment_stays_outside(user: User, workspace: Path) -> None:
    """Although the policy passes the variable, the run's own placeholder stands in it."""
    with FakeModel() as model:
        set_up(user, model)
        text = policy(model).replace("environment_audit", 'pass_environment = ["ANTHROPIC_API_KEY"]\nenvironment_audit')
        user.write_policy(text)
        done = user.run("run", "shell", "--", "env", cwd=workspace, ANTHROPIC_API_KEY="sk-canary-key")

        assert "sk-canary-key" not in done.stdout
        assert "ANTHROPIC_API_KEY=cloister-" in done.stdout
        user.close()
