"""Providers whose key is a login: the token reaches the login's own hosts only, and is never inside."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister.credentials import logins as kept_logins
from cloister.credentials.oauth_answers import read_token_answer
from cloister.host.logins import Shelf
from support.cloister import BASE, User
from support.fake_oauth import FakeOauth
from support.inference import OK, Scripted

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
REFUSED = b"HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
BODY = json.dumps({"model": "claude-x", "max_tokens": 16, "messages": [{"role": "user", "content": "hi"}]})
ASK = f'curl -sS -m 20 "$ANTHROPIC_BASE_URL/v1/messages" -H "x-api-key: $ANTHROPIC_API_KEY" -d \'{BODY}\''


@pytest.fixture
def provider() -> Iterator[FakeOauth]:
    """A provider of tokens."""
    with FakeOauth() as provider:
        yield provider


@pytest.fixture
def model(provider: FakeOauth) -> Iterator[Scripted]:
    """A model that answers to the provider's good access tokens only."""

    def answer(conn: socket.socket, request: bytes) -> bool:
        conn.sendall(OK if provider.is_good(field(request, "authorization").removeprefix("Bearer ")) else REFUSED)
        return True

    with Scripted(answer) as model:
        yield model


def field(request: bytes, name: str) -> str:
    """Return the values of a header field of a request, joined."""
    lines = request.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    return ", ".join(value for key, _, value in (one.partition(": ") for one in lines) if key.lower() == name)


def log_in(user: User, provider: FakeOauth, *, age_s: float = 0.0, **changes: Any) -> None:
    """Store a login of the user, made some time ago."""
    now = time.time() - age_s
    headers = {"anthropic-beta": "oauth-2025-04-20"}
    login = provider.login(**{"hosts": ("127.0.0.1",), "headers": headers, **changes})
    granted = read_token_answer(200, json.dumps(provider.grant()).encode(), now)
    with Shelf(str(user.state / "logins")).held("work") as held:
        held.write(kept_logins.encode(kept_logins.new("work", "test", login, granted, now)))


def set_up(user: User, model: Scripted, *, more: str = "") -> None:
    """Write a policy whose provider has the login as its key."""
    table = f'[providers.one]\nbase_url = "http://127.0.0.1:{model.port}"\nkey = "login:work"\n{more}'
    user.write_policy(f'{BASE}{table}[agents.shell.llm]\nproviders = ["one"]\n')


def tokens(provider: FakeOauth) -> set[str]:
    """Return every token there is."""
    return {token for family in provider.families for token in (*family.access, family.refresh)}


def test_a_login_opens_a_provider(user: User, workspace: Path, provider: FakeOauth, model: Scripted) -> None:
    """Sent as bearer with the login's beta beside the agent's own; inside and in every record there is no token."""
    log_in(user, provider)
    set_up(user, model)

    done = user.inside(f"{ASK} -H 'anthropic-beta: tools-1, mcp-2'; {ASK}; env", cwd=workspace)

    assert done.stdout.count('"text":"hello"') == 2, done.stdout + done.stderr
    assert [field(one, "anthropic-beta") for one in model.requests] == [
        "tools-1, mcp-2,oauth-2025-04-20",
        "oauth-2025-04-20",
    ]
    assert not [one for one in model.requests if field(one, "x-api-key")]
    records = [path for path in user.state.rglob("*") if path.is_file() and path.parent.name != "logins"]
    texts = [done.stdout, done.stderr, *(path.read_text("latin-1") for path in records)]
    assert not [token for token in tokens(provider) for text in texts if token in text]
    user.close()


def test_a_refused_token_is_renewed_in_the_same_call(
    user: User, workspace: Path, provider: FakeOauth, model: Scripted
) -> None:
    """The provider ended the access token: the model says 401 once, the agent sees the answer, and events tell."""
    log_in(user, provider)
    provider.families[0].access.clear()
    set_up(user, model)

    done = user.inside(f"{ASK}; sleep 0.2", cwd=workspace)

    assert '"text":"hello"' in done.stdout, done.stdout + done.stderr
    assert len(model.requests) == 2
    assert provider.renewals() == 1
    folder = user.state / "runs" / user.receipts()[-1]["id"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    assert [(one["login"], one["what"]) for one in events if one["event"] == "login"] == [("work", "renewed")]
    user.close()


def test_a_login_opens_its_own_hosts_only(user: User, workspace: Path, provider: FakeOauth, model: Scripted) -> None:
    """A provider at another host is refused before anything starts; `check` says so with the line."""
    log_in(user, provider, hosts=("api.example.org",))
    set_up(user, model)

    done = user.inside(ASK, cwd=workspace)
    checked = user.run("check", cwd=workspace)

    assert done.returncode == 125
    assert "login-host" in done.stderr
    assert "api.example.org" in done.stderr
    assert "is not for 127.0.0.1" in checked.stdout + checked.stderr
    assert model.requests == []
    user.close()


@pytest.mark.parametrize("ended", [True, False])
def test_a_login_that_is_over_starts_nothing(
    user: User, workspace: Path, provider: FakeOauth, model: Scripted, ended: bool
) -> None:
    """Ended at its provider, or never made: nothing starts, and the error says what to type."""
    if ended:
        log_in(user, provider, age_s=4000)
        provider.families[0].ended = True
    set_up(user, model)

    done = user.inside("echo started", cwd=workspace)

    assert done.returncode == 125
    assert "cloister login work" in done.stderr
    assert "started" not in done.stdout
    assert not user.receipts()
    user.close()


@pytest.mark.parametrize(
    ("key", "content", "told"),
    [
        ("file:~/model.key", None, "cannot be had"),
        ("file:~/model.key", "two words\n", "holds spaces"),
        ("env:MODEL_KEY", None, "the broker, which all runs share"),
        ("command:false", None, "ended with"),
    ],
)
def test_a_key_that_cannot_be_had_starts_nothing(  # noqa: PLR0913 - fixtures
    user: User, workspace: Path, model: Scripted, key: str, content: str | None, told: str
) -> None:
    """The run is refused before anything of it exists, with the provider's name and reference; the twin starts."""
    path = user.home / "model.key"
    if content is not None:
        path.write_text(content)
        path.chmod(0o600)
    table = f'[providers.one]\nbase_url = "http://127.0.0.1:{model.port}"\nkey = "{key}"\n'
    user.write_policy(f'{BASE}{table}[agents.shell.llm]\nproviders = ["one"]\n')

    refused = user.run("run", "shell", "--", "echo", "started", cwd=workspace, MODEL_KEY="made-up-value")

    assert refused.returncode == 125
    assert "secret-unavailable" in refused.stderr
    assert f".providers.one.key: {key}" in refused.stderr
    assert told in refused.stderr
    assert "made-up-value" not in refused.stderr
    assert "started" not in refused.stdout
    assert not user.receipts()
    path.write_text("made-up-upstream-key-3\n")
    path.chmod(0o600)
    user.write_policy(user_policy(model))
    assert "started" in user.run("run", "shell", "--", "echo", "started", cwd=workspace).stdout
    user.close()


def user_policy(model: Scripted) -> str:
    """Return a policy whose provider's key can be read."""
    table = f'[providers.one]\nbase_url = "http://127.0.0.1:{model.port}"\nkey = "file:~/model.key"\n'
    return f'{BASE}{table}[agents.shell.llm]\nproviders = ["one"]\n'
