"""`cloister metrics`: the living broker's numbers as Prometheus reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.cloister import BASE, User
from support.fake_model import FakeModel
from support.model_wire import INPUT_TOKENS, OUTPUT_TOKENS

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
SECRET = "made-up-upstream-key-7"
BODY = '{"model": "claude-sonnet-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "hi"}]}'
ASK = f'curl -sS -m 30 "$ANTHROPIC_BASE_URL/v1/messages" -H "x-api-key: $ANTHROPIC_API_KEY" -d \'{BODY}\''


def numbers(user: User, workspace: Path) -> dict[str, float]:
    """Return every sample, named with its labels, as a parser of somebody else's reads the text."""
    done = user.run("metrics", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout
    found = {}
    for family in text_string_to_metric_families(done.stdout):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_without_a_broker_none_is_started(user: User, workspace: Path) -> None:
    """The text says that it is down, and the exit status is that of a collector's timer that went well."""
    assert numbers(user, workspace) == {"cloister_broker_up{}": 0, "cloister_runs_alive{}": 0}
    assert user.broker_pid == 0


def test_a_broker_tells_what_its_runs_called(user: User, workspace: Path) -> None:
    """Before a call the runs alone; afterwards calls, tokens, refusals, budgets and ledger, as the rows have them."""
    key = user.home / "model.key"
    key.write_text(SECRET)
    key.chmod(0o600)
    with FakeModel() as model:
        provider = f'[providers.one]\nbase_url = "{model.url}"\nkey = "file:~/model.key"\n'
        limits = 'providers = ["one"]\nmodels = ["claude-*"]\ntokens_per_day = 1000\n'
        user.write_policy(f"{BASE}{provider}[agents.shell.llm]\n{limits}")
        living = user.run("run", "--detach", "shell", "--", "sleep", "300", cwd=workspace).stdout.strip()
        first = numbers(user, workspace)
        done = user.inside(f"{ASK}; {ASK}; {ASK.replace('claude-sonnet-4-5', 'other')}", cwd=workspace)
        found = numbers(user, workspace)
    user.run("stop", living, cwd=workspace)
    user.close()

    assert first["cloister_broker_up{}"] == first["cloister_runs_alive{}"] == 1
    assert done.stdout.count("FAKE-OK") == 2
    call = "agent=shell,model=claude-sonnet-4-5,provider=one,status=200"
    assert found[f"cloister_llm_requests_total{{{call}}}"] == 2
    kinds = {kind: found[f"cloister_llm_tokens_total{{agent=shell,kind={kind},{call[12:]}}}"] for kind in
             ("input", "output")}  # fmt: skip
    assert kinds == {"input": 2 * INPUT_TOKENS, "output": 2 * OUTPUT_TOKENS}
    assert found["cloister_llm_refused_total{agent=shell,reason=model-not-allowed}"] == 1
    share = found["cloister_llm_budget_used_ratio{agent=shell,span=day,unit=tokens}"]
    assert share == pytest.approx(2 * (INPUT_TOKENS + OUTPUT_TOKENS) / 1000)
    assert found["cloister_ledger_up{}"] == 1
    assert found["cloister_llm_in_flight{agent=shell}"] == 0
    assert found[f"cloister_llm_duration_seconds_count{{{call.rpartition(',')[0]}}}"] == 2
