"""Runs that call the inference service by their identity tokens: real tokens of real runs, and what forgers make."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.runs.identity_store import IdentityStore
from support import jws
from support.cloister import BASE, User
from support.inference import DELTA, FIRST_EVENT, OK, STREAM_HEAD, Scripted, chunk

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

RUNS = BASE + '[agents.shell.identity]\naudiences = ["vault"]\n'
SERVICE = """\
schema = 1
[providers.one]
base_url = "http://127.0.0.1:{port}"
key = "file:~/model.key"
[agents.shell]
preset = "shell"
[agents.shell.llm]
providers = ["one"]
{more}
"""
BODY = {"model": "claude-sonnet-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "hi"}]}
BOX = "/run/cloister/box/identity"


class Service:
    """The inference service of a user, without virtual keys, with a policy of its own."""

    def __init__(self, user: User, port: int, more: str = "") -> None:
        self.user = user
        self.policy = user.home / "service.toml"
        self.write(port, more)
        key = user.home / "model.key"
        key.write_text("made-up-upstream-key-4\n")
        key.chmod(0o600)
        words = ("--policy", str(self.policy), "--listen", "127.0.0.1:0")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cloister.services.inference", *words],
            env=user.environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def write(self, port: int, more: str) -> None:
        """Write the policy."""
        self.policy.write_text(SERVICE.format(port=port, more=more))
        self.policy.chmod(0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def request(self, token: str, field: str = "authorization", *, stream: bool = False) -> urllib.request.Request:
        """Return a model call."""
        value = f"Bearer {token}" if field == "authorization" else token
        data = json.dumps({**BODY, "stream": stream}, separators=(",", ":")).encode()
        return urllib.request.Request(f"{self.url}/v1/messages", data, {field: value})  # noqa: S310 - http, our own

    def ask(self, token: str, field: str = "authorization") -> tuple[int, str]:
        """Return status and body of an answer."""
        try:
            with urllib.request.urlopen(self.request(token, field), timeout=20) as answer:  # noqa: S310
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def model() -> Iterator[Scripted]:
    """A model."""
    with Scripted() as model:
        yield model


@pytest.fixture
def user(user: User) -> User:
    """The user of the kernel tests, whose runs have tokens and no models of their own."""
    user.write_policy(RUNS)
    return user


def start(user: User, workspace: Path) -> str:
    """Start a run that waits; return its id."""
    started = user.run("run", "--detach", "shell", "--", "sleep", "300", cwd=workspace)
    assert started.returncode == 0, started.stderr
    return started.stdout.strip()


def token_of(user: User, workspace: Path, run: str, name: str = "cloister.jwt") -> str:
    """Return a token as the run finds it."""
    return user.run("exec", run, "--", "cat", f"{BOX}/{name}", cwd=workspace).stdout


def refused_at_last(service: Service, token: str) -> bool:
    """Wait until a token is refused; a second, at most, between processes."""
    until = time.monotonic() + 3
    while time.monotonic() < until:
        if service.ask(token)[0] == 401:
            return True
        time.sleep(0.05)
    return False


def test_a_run_calls_by_its_token_until_it_ends(user: User, workspace: Path, model: Scripted) -> None:
    """In either header; agent, run and user are those of the token, in the ledger too; void when the run ends."""
    run = start(user, workspace)
    token = token_of(user, workspace, run)
    with Service(user, model.port) as service:
        assert [service.ask(token, field)[0] for field in ("authorization", "x-api-key")] == [200, 200]
        assert all(token.encode() not in request for request in model.requests)
        user.run("stop", run, cwd=workspace)
        assert refused_at_last(service, token)
        assert len(model.requests) == 2
    ledger = sqlite3.connect(user.state / "ledger/ledger.db")
    rows = ledger.execute("select agent, run, \"user\" from calls where outcome = 'complete'").fetchall()
    claims = json.loads(jws.unb64(token.split(".")[1]))
    assert rows == [("shell", run, claims["user"])] * 2
    user.close()


@pytest.mark.parametrize("kind", ["run", "agent"])
def test_revoking_ends_calls_where_they_are(user: User, workspace: Path, model: Scripted, kind: str) -> None:
    """The next request is refused, and a stream under way breaks off with a reason; another run goes on."""
    run = start(user, workspace)
    token = token_of(user, workspace, run)
    seen = threading.Event()

    def endless(conn: socket.socket, request: bytes) -> bool:
        if b'"stream":true' not in request:
            conn.sendall(OK)
            return True
        conn.sendall(STREAM_HEAD + chunk(FIRST_EVENT))
        while True:
            conn.sendall(chunk(DELTA))
            seen.set()
            time.sleep(0.05)

    model.script = endless
    with Service(user, model.port) as service:
        answer = urllib.request.urlopen(service.request(token, stream=True), timeout=20)  # noqa: S310
        assert seen.wait(10)
        done = user.run("identity", "revoke", kind, run if kind == "run" else "shell", cwd=workspace)
        assert done.returncode == 0, done.stderr
        assert service.ask(token)[0] == 401
        with pytest.raises(http.client.IncompleteRead) as broken:  # no last chunk
            answer.read()
        assert b"the identity of this run was revoked" in broken.value.partial
        answer.close()
        other = token_of(user, workspace, start(user, workspace))
        assert service.ask(other)[0] == 200
    user.close()


def forgeries(user: User, run: str, token: str, vault: str) -> dict[str, str]:
    """Return tokens that look right and are not: the main rows of the matrix in `test_forged_tokens`."""
    store = IdentityStore(str(user.state / "identity"), {})
    state = store.read()
    key = state.signing_key("shell")
    assert key is not None
    own = Ed25519PrivateKey.from_private_bytes(state.seeds[key.kid].value)
    public = own.public_key().public_bytes_raw()
    store.close()
    head, payload, mark = token.split(".")
    header, claims = json.loads(jws.unb64(head)), json.loads(jws.unb64(payload))

    def signed(private: Ed25519PrivateKey = own, more: dict[str, Any] | None = None, **changes: Any) -> str:
        return jws.make(header | (more or {}), claims | changes, private)

    hs = f"{jws.b64(json.dumps(header | {'alg': 'HS256'}))}.{payload}"
    now = int(time.time())
    return {
        "no algorithm": f"{jws.b64(json.dumps(header | {'alg': 'none'}))}.{payload}.",
        "hmac with the public key": f"{hs}.{jws.b64(hmac.new(public, hs.encode(), hashlib.sha512).digest())}",
        "another key": signed(Ed25519PrivateKey.generate()),
        "a key of its own": signed(Ed25519PrivateKey.generate(), {"jwk": {"kty": "OKP", "x": jws.b64(public)}}),
        "a key that is a path": signed(more={"kid": "../../../../etc/passwd"}),
        "another payload": f"{head}.{jws.b64(json.dumps(claims | {'agent': 'other'}))}.{mark}",
        "another audience": vault,
        "another audience, signed": signed(aud="vault"),
        "two audiences": signed(aud=["cloister", "vault"]),
        "expired": signed(iat=now - 800, nbf=now - 800, exp=now - 1),
        "not yet": signed(nbf=now + 600),
        "for ever": signed(exp=now + 10**9),
        "another agent": signed(agent="other", sub=claims["sub"].replace("/agent/shell/", "/agent/other/")),
        "another user": signed(user="somebody"),
        "another domain": signed(iss="spiffe://evil.example"),
        "a run that is none": signed(run="0" * 12, sub=claims["sub"].replace(run, "0" * 12)),
        "a run that is a path": signed(run="../..", sub=claims["sub"].replace(run, "../..")),
        "one claim more": signed(admin=True),
        "cut": token[:-1],
        "spaced": token.replace(".", ". ", 1),
        "nothing": "",
        "dots": "..",
        "long": "a" * 5000 + ".b." + "c" * 86,
    }


def test_forged_tokens_open_nothing(user: User, workspace: Path, model: Scripted) -> None:
    """Each is refused with 401 in both headers, and nothing reaches the upstream; the real token goes on working."""
    run = start(user, workspace)
    token = token_of(user, workspace, run)
    with Service(user, model.port) as service:
        assert service.ask(token)[0] == 200
        forged = forgeries(user, run, token, token_of(user, workspace, run, "vault.jwt"))
        found = {(name, field): service.ask(one, field)[0] for name, one in forged.items() for field in
                 ("authorization", "x-api-key")}  # fmt: skip
        assert {name: status for name, status in found.items() if status != 401} == {}
        assert len(model.requests) == 1
        assert service.ask(token)[0] == 200
    user.close()


def test_a_token_gives_what_profile_and_project_leave(user: User, workspace: Path, model: Scripted) -> None:
    """The project's own file tightens the run's calls here as well; a reload counts for runs that called before."""
    (workspace / ".cloister.toml").write_text("schema = 1\n[agents.shell.llm]\nmax_tokens = 7\n")
    token = token_of(user, workspace, start(user, workspace))
    with Service(user, model.port) as service:
        assert service.ask(token)[0] == 200
        assert b'"max_tokens":7' in model.requests[0].replace(b" ", b"")
        service.write(model.port, 'models = ["gpt-*"]')
        os.kill(service.process.pid, signal.SIGHUP)
        until = time.monotonic() + 10
        while (status := service.ask(token)[0]) == 200 and time.monotonic() < until:
            time.sleep(0.05)
        assert status == 403
    user.close()


def test_a_run_that_is_recorded_cannot_go_round_its_record(user: User, workspace: Path, model: Scripted) -> None:
    """This service keeps no recordings: where the policy asks for one a token opens nothing, also after a reload."""
    run = start(user, workspace)
    token = token_of(user, workspace, run)
    with Service(user, model.port, "record = true") as service:
        assert service.ask(token)[0] == 401
        service.write(model.port, "")
        service.process.send_signal(signal.SIGHUP)
        assert service.ask(token)[0] in {200, 401}
        assert service.ask(token)[0] == 200
        service.write(model.port, "record = true")
        service.process.send_signal(signal.SIGHUP)
        assert refused_at_last(service, token)
    user.run("stop", run, cwd=workspace)
    user.close()
