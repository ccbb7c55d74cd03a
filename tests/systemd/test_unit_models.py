"""Real agents of two people as system users: models and secrets of the system reach their hosts, and never a unit."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models_rig import KEY, KEY_FILE, PLANTED, SEARCH, SECRET, SECRET_FILE, Models

from support.machines import AGENTS, Machine

pytestmark = pytest.mark.agents

TERMINAL = """
import os, sys
from pathlib import Path
from support.terminal import Terminal
with Terminal(["cloister", *sys.argv[2:]], cwd=Path.cwd(), env=dict(os.environ)) as terminal:
    exec(sys.argv[1])
"""
CALL = """
curl -s -o /dev/null -w '%{http_code}\\n' http://127.0.0.1:11435/v1/messages -H "x-api-key: $CLOISTER_MODEL_KEY" \
  -H 'anthropic-version: 2023-06-01' -H 'content-type: application/json' \
  -d '{"model": "fake-1", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}'
"""
CURL = 'curl -sS -m 20 -H "Authorization: Bearer $TOKEN" https://host.cloister.internal:{port}/x'


@pytest.fixture(scope="module")
def up(suite: str, layers: Any, agents_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    """One installed machine for the tests of this file, on Debian 12 and 13."""
    place = tmp_path_factory.mktemp(f"models-{suite}")
    with Machine(suite, layers(suite), place, binds={AGENTS: agents_bin.parent}) as machine:
        models = Models(machine)
        yield models
        models.close()


@pytest.mark.parametrize("user", ["alice", "bob"])
@pytest.mark.parametrize("agent", ["claude", "pi"])
def test_a_real_agent_works_and_finds_no_key(up: Models, agent: str, user: str) -> None:
    """Claude Code and Pi answer through the system's broker; a search from inside finds no secret, and would."""
    before = len(up.model.requests)
    planted = f"/home/{user}/p/one/planted.txt"
    up.machine.write(planted, PLANTED, owner=user)
    done = up.cloister("run", agent, "search for it", user=user)
    assert "ALL-DONE" in done.stdout, (done, up.machine.journal("cloister-proxyd")[-4000:])
    requests = up.model.requests[before:]
    header = "x-api-key" if agent == "claude" else "authorization"
    assert {request["headers"].get(header, "").removeprefix("Bearer ") for request in requests} == {KEY}
    found = [result for result in requests[-1]["tool_results"] if "SEARCHED" in result]
    assert [line for line in found[-1].splitlines() if "FOUND" in line] == [f"FOUND {planted}"], found


def test_the_secrets_are_where_root_put_them_and_nowhere_else(up: Models) -> None:
    """A search of the whole machine with root's eyes finds the files, what systemd made of them, and nothing else."""
    up.cloister("run", "pi", "hi")
    up.inside("bound", CURL.format(port=up.port))
    skipped = f"/sys:/usr:/dev:/proc:/srv:{AGENTS}:/opt"  # /srv is of the model and of the host that may know them
    done = up.machine.run(["python3", "-c", SEARCH, skipped, KEY[::-1], SECRET[::-1]])
    found = sorted(line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND"))
    delivered = [path for path in found if path.startswith("/run/credentials/cloister-proxyd.service/")]
    assert len(delivered) == 2, found
    assert sorted({*found} - {*delivered}) == sorted([KEY_FILE, SECRET_FILE])
    journal = up.machine.journal()
    assert "cloister-hostd" in journal
    assert KEY not in journal
    assert SECRET not in journal


def test_calls_are_booked_by_agent_and_user(up: Models) -> None:
    """The system's ledger has who made which call; root reads it, and a person reads the own run's part."""
    for user in ("alice", "bob"):
        assert up.inside("sh", CALL, user=user).stdout == "200\n"
    users = up.usage("--by", "user", "--agent", "sh")
    assert {name: line["requests"] for name, line in users.items()} == {"alice": 1, "bob": 1}
    assert up.usage()["sh"]["requests"] == 2
    receipt = json.loads(up.cloister("receipt", "last", "--json").stdout)
    assert receipt["model_use"]["calls"] == 1
    assert receipt["model_use"]["tokens"] > 0
    assert "1 call, " in up.cloister("receipt", "last").stdout
    refused = up.cloister("usage", "--system")
    assert (refused.returncode, "root-needed" in refused.stderr) == (77, True)


def test_a_budget_is_a_persons_own(up: Models) -> None:
    """What alice has used up refuses her, and nobody else."""
    codes = up.inside("sh", f"for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do {CALL} done").stdout.split()
    assert codes[-1] == "429", codes
    assert up.inside("sh", CALL, user="bob").stdout == "200\n"


def test_a_bound_secret(up: Models) -> None:
    """The unit has a placeholder, the bound host the secret; to a model, a placeholder stays one."""
    before = len(up.received())
    done = up.inside("bound", f'{CURL.format(port=up.port)}; echo; echo "$TOKEN"')
    assert done.stdout.startswith("hello\ncloister-"), (done, up.machine.journal("cloister-proxyd")[-3000:])
    assert SECRET not in done.stdout
    assert [fields["authorization"] for fields in up.received()[before:]] == [f"Bearer {SECRET}"]
    told = json.loads(up.cloister("receipt", "last", "--json").stdout)
    assert told["credentials"] == [f"token: 1 requests to host.cloister.internal:{up.port}"]
    taken = up.inside("bound", CURL.format(port=up.port).replace("$TOKEN", done.stdout.split()[-1]), user="bob")
    assert "hello" not in taken.stdout or f"Bearer {SECRET}" not in up.received()[-1]["authorization"], taken


@pytest.mark.parametrize("user", ["alice", "bob"])
def test_tokens_name_the_person(up: Models, user: str) -> None:
    """An identity token of a unit says which person's run it is, by the kernel's word."""
    done = up.inside("bound", 'cat "$CLOISTER_IDENTITY_DIRECTORY"/*', user=user)
    body = done.stdout.strip().split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    assert claims["aud"] == "https://aud.example"
    assert user in json.dumps(claims), claims
    assert {"alice": "bob", "bob": "alice"}[user] not in json.dumps(claims)


def on_terminal(up: Models, steps: str, *words: str, user: str = "alice", **options: Any) -> str:
    """Run `cloister` on a terminal inside the machine; `steps` are Python with `terminal`."""
    done = up.machine.python(TERMINAL, steps, *words, user=user, cwd=f"/home/{user}/p/one", **options)
    return str(done.stdout)


def test_a_question_is_put_on_the_persons_terminal(up: Models) -> None:
    """Mode `ask`: alice sees the host and decides; what she allowed for good is not allowed for bob."""
    script = "curl -sS -m 30 -o /dev/null -w 'code=%{http_connect}\\n' https://asked.invalid/; echo over"
    words = ("run", "asking", "--", "/bin/bash", "-c", script)
    steps = "terminal.until('asked.invalid'); terminal.type('a'); terminal.until('over');"
    steps += "print(terminal.process.wait(20))"
    assert on_terminal(up, steps, *words).strip() == "0"
    again = up.inside("asking", script)
    assert "code=403" not in again.stdout, again
    assert "code=403" in up.inside("asking", script, user="bob").stdout


def test_the_look_at_what_is_carried_in(up: Models) -> None:
    """With `--env` the person is shown what the agent will see, masked, before the unit is made; no is no."""
    words = ("run", "-e", "MORE", "sh", "--", "/bin/bash", "-c", 'echo "got=$MORE=$CARRIED"')
    env = {"MORE": "token-made-up-77aa88bb99cc", "CARRIED": "plain"}
    steps = "seen = terminal.until('[Y/n]'); terminal.type('{}\\n'); seen += terminal.until('{}');"
    steps += "print(seen, terminal.process.wait(20))"
    shown = on_terminal(up, steps.format("y", "got=token"), *words, env=env)
    assert "MORE" in shown
    assert shown.split()[-1] == "0"
    refused = on_terminal(up, steps.format("n", "cloister"), *words, env=env)
    assert refused.split()[-1] == "125", refused
