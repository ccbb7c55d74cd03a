"""The ledger in a real PostgreSQL, through the whole program: rows, sums, and what a person sees when it is away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from support.cloister import BASE, User
from support.fake_model import FakeModel
from support.model_wire import INPUT_TOKENS, OUTPUT_TOKENS
from support.postgres import Postgres

pytestmark = [pytest.mark.kernel]
BODY = '{"model": "claude-sonnet-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "hi"}]}'
ASK = f'curl -sS -m 30 "$ANTHROPIC_BASE_URL/v1/messages" -H "x-api-key: $ANTHROPIC_API_KEY" -d \'{BODY}\''


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """One cluster for all tests of this file."""
    with Postgres() as server:
        yield server


@pytest.fixture
def model() -> Iterator[FakeModel]:
    """A model."""
    with FakeModel() as model:
        yield model


def set_up(user: User, model: FakeModel, ledger: str, limits: str = "") -> None:
    """Write a policy whose ledger is named by a reference, and the files it needs."""
    for name, text in (("model.key", "made-up-upstream-key-5"), ("ledger", ledger)):
        path = user.home / ".config/cloister" / name
        path.write_text(f"{text}\n")
        path.chmod(0o600)
    provider = f'[providers.one]\nbase_url = "{model.url}"\nkey = "file:~/.config/cloister/model.key"\n'
    database = f'[ledger]\ndatabase = "{"file:~/.config/cloister/ledger" if ledger else ""}"\n'
    user.write_policy(f'{BASE}{provider}{database}[agents.shell.llm]\nproviders = ["one"]\n{limits}')


def rows(server: Postgres) -> list[tuple[str, int, str]]:
    """Return the server's rows."""
    with psycopg.connect(server.address) as connection:
        return connection.execute("select run, tokens, outcome from calls order by id").fetchall()


def test_calls_are_counted_in_postgresql(user: User, workspace: Path, model: FakeModel, server: Postgres) -> None:
    """Each call is a row there and not in SQLite; `usage` reads it; a new broker goes on with what was used."""
    set_up(user, model, server.address, f"tokens_per_day = {INPUT_TOKENS + OUTPUT_TOKENS + 70}\n")
    before = len(rows(server)) if server.running and _has_table(server) else 0

    first = user.inside(ASK, cwd=workspace)
    pid = user.broker_pid
    descriptor = os.pidfd_open(pid)
    subprocess.run(["kill", str(pid)], check=True)
    _ended(descriptor)
    second = user.inside(ASK.replace('"max_tokens": 16', '"max_tokens": 60'), cwd=workspace)
    used = user.run("usage", "--json", cwd=workspace)

    assert "FAKE-OK" in first.stdout, first.stdout + first.stderr
    assert "rate_limit_error" in second.stdout
    assert [(tokens, outcome) for _, tokens, outcome in rows(server)[before:] if outcome == "complete"] == [
        (INPUT_TOKENS + OUTPUT_TOKENS, "complete")
    ]
    assert not (user.state / "ledger/ledger.db").exists()
    assert '"shell"' in used.stdout, used.stderr
    assert server.address not in used.stdout + used.stderr + first.stdout + first.stderr
    user.close()


def test_a_shared_ledger_gives_each_user_a_budget(
    user: User, workspace: Path, model: FakeModel, server: Postgres
) -> None:
    """What somebody else used with an agent of the same name is in the ledger, and not in this user's budget."""
    set_up(user, model, server.address, "tokens_per_day = 1000\n")
    assert "FAKE-OK" in user.inside(ASK, cwd=workspace).stdout
    user.run("stop", "last", cwd=workspace)
    pid = user.broker_pid
    descriptor = os.pidfd_open(pid)
    subprocess.run(["kill", str(pid)], check=True)
    _ended(descriptor)
    with psycopg.connect(server.address) as connection:
        columns = [
            name
            for (name,) in connection.execute(
                "select column_name from information_schema.columns where table_name = 'calls'"
            )
        ]
        other = {"id": "'OTHER' || id", '"user"': "'somebody else'", "tokens": "tokens + 1000000"}
        quoted = [f'"{name}"' for name in columns]
        values = [other.get(name.strip('"'), other.get(name, name)) for name in quoted]
        connection.execute(f"insert into calls ({', '.join(quoted)}) select {', '.join(values)} from calls")  # noqa: S608 - names of our own columns

    assert "FAKE-OK" in user.inside(ASK, cwd=workspace).stdout
    user.close()


def test_without_its_server_no_call_is_made(user: User, workspace: Path, model: FakeModel, server: Postgres) -> None:
    """Nobody knows what was used, so the agent gets 503 with the reason; `doctor` says it; it works when it is back."""
    set_up(user, model, server.address)
    server.stop()
    try:
        away = user.inside(ASK, cwd=workspace)
        doctor = user.run("doctor", cwd=workspace)
    finally:
        server.start()
    back = user.inside(ASK, cwd=workspace)

    assert "what was spent cannot be known" in away.stdout
    assert "FAKE-OK" not in away.stdout
    assert "ledger" in doctor.stdout
    assert "it cannot be read:" in " ".join(doctor.stdout.split())
    assert "key one" in doctor.stdout
    assert "made-up-upstream-key-5" not in doctor.stdout
    assert "FAKE-OK" in back.stdout, back.stdout + back.stderr
    assert len(model.requests) == 1
    user.close()


def test_another_ledger_counts_for_runs_that_start_from_now_on(
    user: User, workspace: Path, model: FakeModel, server: Postgres
) -> None:
    """With a living run that is counted in the old one, a start is refused and says so; without, it just moves."""
    set_up(user, model, "")
    assert "FAKE-OK" in user.inside(ASK, cwd=workspace).stdout
    living = user.run("run", "--detach", "shell", "--", "sleep", "300", cwd=workspace).stdout.strip()
    set_up(user, model, server.address)

    refused = user.inside(ASK, cwd=workspace)
    user.run("stop", living, cwd=workspace)
    moved = user.inside(ASK, cwd=workspace)

    assert refused.returncode == 125
    assert "ledger-changed" in refused.stderr
    assert living in refused.stderr
    assert "FAKE-OK" in moved.stdout, moved.stdout + moved.stderr
    user.close()
    assert user.receipts()[-1]["id"] in {run for run, _, _ in rows(server)}


@pytest.mark.usefixtures("nothing_left")
def test_one_process_keeps_the_books_and_the_other_says_who(user: User, workspace: Path, model: FakeModel) -> None:
    """Whichever of broker and inference service comes second is refused, with the process that has them."""
    set_up(user, model, "")
    words = [sys.executable, "-m", "cloister.services.inference", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(words, env=user.environment, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        assert service.stdout.readline().startswith("http://")
        refused = user.inside(ASK, cwd=workspace)
        service.terminate()
        assert service.wait(20) == 0
    assert refused.returncode == 125
    assert "ledger-in-use" in refused.stderr
    assert f"by the inference service, process {service.pid}" in refused.stderr

    assert "FAKE-OK" in user.inside(ASK, cwd=workspace).stdout
    second = subprocess.run(words, env=user.environment, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 75
    assert f"by the broker, process {user.broker_pid}" in second.stderr
    user.close()


def _has_table(server: Postgres) -> bool:
    with psycopg.connect(server.address) as connection:
        found = connection.execute("select to_regclass('calls')").fetchone()
    return bool(found and found[0])


def _ended(descriptor: int) -> None:
    from support.cloister import wait_for

    wait_for(descriptor)
    os.close(descriptor)
