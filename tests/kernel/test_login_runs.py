"""Logins through the whole program: real broker, sandbox and TLS; tokens reach provider and host, never the inside."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.credentials import logins as kept_logins
from cloister.credentials.oauth_answers import read_token_answer
from cloister.host.logins import Shelf
from support.cloister import BASE, User
from support.fake_oauth import FakeOauth, make_certificate

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
HOST = "host.cloister.internal"


@pytest.fixture
def provider(tmp_path: Path, user: User) -> Iterator[FakeOauth]:
    """A provider, and an API over TLS that takes only its good access tokens."""
    authority, certificate = make_certificate(tmp_path, HOST)
    user.environment["SSL_CERT_FILE"] = str(authority)
    with FakeOauth() as provider:
        provider.also_over_tls(certificate)
        yield provider


def log_in(user: User, provider: FakeOauth, *, age_s: float = 0.0, **changes: object) -> kept_logins.Kept:
    """Store a login of the user, made some time ago."""
    now = time.time() - age_s
    login = provider.login(**{"hosts": (HOST,), **changes})
    granted = read_token_answer(200, json.dumps(provider.grant()).encode(), now)
    kept = kept_logins.new("work", "test", login, granted, now)
    with Shelf(str(user.state / "logins")).held("work") as held:
        held.write(kept_logins.encode(kept))
    return kept


def policy(port: int, *, env: str = 'env = "TOKEN"', host: str = HOST) -> str:
    """Return a policy whose agent uses the login for the API."""
    inject = f'inject = {{ host = "{host}", port = {port}, scheme = "bearer" }}'
    table = f'[agents.shell.credentials.work]\nsecret = "login:work"\n{env}\n{inject}\n'
    return f'{BASE}[agents.shell.egress]\nallow = ["{host}:{port}"]\n{table}'


def call(port: int, *words: str, path: str = "/v1/x") -> str:
    """Return a request with the placeholder."""
    more = " ".join(words)
    return f'curl -sS -m 20 -H "Authorization: Bearer $TOKEN" {more} https://{HOST}:{port}{path}; echo;'


def tokens(provider: FakeOauth) -> set[str]:
    """Return every token there is."""
    return {token for family in provider.families for token in (*family.access, family.refresh)}


def events(user: User, kind: str) -> list[dict[str, object]]:
    """Return the events of the newest run."""
    lines = (user.state / "runs" / user.receipts()[-1]["id"] / "events.jsonl").read_bytes().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_placeholder_keeps_working_while_the_token_rotates(user: User, workspace: Path, provider: FakeOauth) -> None:
    """The provider ends the access token in mid-run: one call fails, the next works, with the same placeholder."""
    log_in(user, provider)
    port = provider.tls_port
    user.write_policy(policy(port))
    (workspace / "wait").write_text("")
    wait = "touch ended; while [ -e wait ]; do sleep 0.1; done;"
    script = f'{call(port)} echo "$TOKEN"; {wait} {call(port)} sleep 0.5; {call(port)}'
    process = user.start("run", "shell", "--", "/bin/sh", "-c", script, cwd=workspace)
    end = time.monotonic() + 30
    while not (workspace / "ended").exists() and time.monotonic() < end:
        time.sleep(0.05)
    provider.families[0].access.clear()
    (workspace / "wait").unlink()
    out, err = process.communicate(timeout=60)

    lines = out.decode().splitlines()
    assert lines[0] == '{"ok": true}', err
    assert lines[1].startswith("cloister-work-")
    assert lines[2:] == ["{}", '{"ok": true}']
    assert provider.renewals() == 1
    assert [event["what"] for event in events(user, "login")] == ["renewed"]
    user.close()


def test_no_token_is_inside_or_in_any_record(user: User, workspace: Path, provider: FakeOauth) -> None:
    """Environment, files and memory the agent reads, the stored plan, events, receipt, output and the broker's log."""
    log_in(user, provider, age_s=3500)
    port = provider.tls_port
    user.write_policy(policy(port))
    places = '"$HOME" /run /tmp /etc'
    look = f"exec 2>/dev/null; cat /proc/*/environ /proc/*/cmdline; find {places} -type f -size -200k -exec cat {{}} +"

    done = user.inside(f"{call(port)} {look}", cwd=workspace)
    user.inside(call(port), cwd=workspace)

    assert '{"ok": true}' in done.stdout
    assert "cloister-work-" in done.stdout  # the search does find what is there
    kept = tokens(provider)
    assert len(kept) >= 3
    records = [path for path in user.state.rglob("*") if path.is_file() and path.parent.name != "logins"]
    texts = [done.stdout, done.stderr, *(path.read_text("latin-1") for path in records)]
    assert len(texts) > 10
    assert not [token for token in kept for text in texts if token in text]
    user.close()


def test_a_login_goes_to_its_own_hosts_only(user: User, workspace: Path, provider: FakeOauth) -> None:
    """A policy that binds it to another host is refused before anything starts, and says which hosts it is for."""
    log_in(user, provider, hosts=("api.example.org",))
    port = provider.tls_port
    user.write_policy(policy(port))

    done = user.inside(call(port), cwd=workspace)

    assert done.returncode == 125
    assert "login-host" in done.stderr
    assert "api.example.org" in done.stderr
    assert not [fields for path, fields in provider.requests if "authorization" in fields]
    user.close()


@pytest.mark.parametrize("ended", [True, False])
def test_a_login_that_is_over_starts_nothing(user: User, workspace: Path, provider: FakeOauth, ended: bool) -> None:
    """Ended at the provider, or never made: one clear error with what to type."""
    if ended:
        log_in(user, provider, age_s=4000)
        provider.families[0].ended = True
    user.write_policy(policy(provider.tls_port))

    done = user.inside("echo started", cwd=workspace)

    assert done.returncode == 125
    assert ("login-expired" if ended else "login-unknown") in done.stderr
    assert "cloister login work" in done.stderr
    assert "started" not in done.stdout
    user.close()


def test_logging_out_ends_what_a_living_run_may_do(user: User, workspace: Path, provider: FakeOauth) -> None:
    """The next request of the run is refused; the agent learns that it cannot be had, the record why."""
    log_in(user, provider)
    port = provider.tls_port
    user.write_policy(policy(port))
    (workspace / "wait").write_text("")
    script = f"{call(port)} touch ended; while [ -e wait ]; do sleep 0.1; done; {call(port)}"
    process = user.start("run", "shell", "--", "/bin/sh", "-c", script, cwd=workspace)
    end = time.monotonic() + 30
    while not (workspace / "ended").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert user.run("logout", "work", cwd=workspace).stdout == "work: revoked\n"
    (workspace / "wait").unlink()
    out, _ = process.communicate(timeout=60)

    assert out.decode().startswith('{"ok": true}\n')
    assert "secret-unavailable" in out.decode()
    assert out.decode().count('{"ok": true}') == 1
    assert "no login" in str(events(user, "credential"))
    user.close()


@pytest.mark.parametrize(
    ("product", "name", "reading"),
    [("claude", ".claude/.credentials.json", "claudeAiOauth"), ("codex", ".codex/auth.json", "tokens")],
)
def test_products_find_a_login_with_placeholders(  # noqa: PLR0913  # fixtures
    user: User, workspace: Path, provider: FakeOauth, product: str, name: str, reading: str
) -> None:
    """The product's own file is there, lasts for decades, cannot be written, is in no record, and works at the host."""
    log_in(user, provider, product=product, product_file=name)
    port = provider.tls_port
    user.write_policy(policy(port, env=""))
    pick = {"claude": "['claudeAiOauth']['accessToken']", "codex": "['tokens']['access_token']"}[product]
    script = (
        f"cat ~/{name}; echo; (echo x > ~/{name}) 2>/dev/null || echo refused;"
        f"TOKEN=$(python3 -c \"import json,os; print(json.load(open(os.path.expanduser('~/{name}'))){pick})\");"
        f"{call(port)}"
    )

    done = user.inside(script, cwd=workspace)

    lines = done.stdout.splitlines()
    file = json.loads(lines[0])
    assert file[reading]
    assert lines[1:] == ["refused", '{"ok": true}'], done.stderr
    placeholder = file["claudeAiOauth"]["refreshToken"] if product == "claude" else file["tokens"]["refresh_token"]
    assert placeholder.startswith("cloister-work-")
    stored = "".join(path.read_text("latin-1") for path in (user.state / "runs").rglob("*") if path.is_file())
    assert placeholder not in stored
    assert "{placeholder}" in stored
    assert not [token for token in tokens(provider) if token in done.stdout + stored]
    assert (user.home / name).read_text() not in done.stdout  # the person's own login, which is a canary here
    user.close()


def test_the_products_own_renewal_is_refused_with_a_reason(user: User, workspace: Path, provider: FakeOauth) -> None:
    """A renewal or a login from inside does not reach the token endpoint; another path of that host does."""
    port = provider.tls_port
    log_in(user, provider, token_url=f"https://{HOST}:{port}/token")
    user.write_policy(policy(port))
    body = '-d "grant_type=refresh_token&refresh_token=$TOKEN"'

    done = user.inside(f"{call(port, body, path='/token')} {call(port, path='/else')}", cwd=workspace)

    assert "login-owned-by-broker" in done.stdout
    assert "cloister login" in done.stdout
    assert '{"ok": true}' in done.stdout
    assert not [path for path, _ in provider.requests if path == "/token"]
    user.close()


def test_a_broker_that_was_killed_while_renewing_loses_nothing(
    user: User, workspace: Path, provider: FakeOauth
) -> None:
    """SIGKILL before the provider has answered: the next broker uses the access token to its end, and says no word."""
    kept = log_in(user, provider, age_s=3400)
    port = provider.tls_port
    user.write_policy(policy(port))

    def kill() -> None:
        provider.on_token = None
        os.kill(user.broker_pid, 9)
        time.sleep(0.2)

    provider.on_token = kill
    user.inside(f"{call(port)} sleep 5", cwd=workspace)
    stored = json.loads((user.state / "logins/work.json").read_text())
    done = user.inside(call(port), cwd=workspace)

    assert stored["renewing"]
    assert stored["access_token"] == kept.access_token
    assert done.stdout == '{"ok": true}\n', done.stderr
    user.close()
