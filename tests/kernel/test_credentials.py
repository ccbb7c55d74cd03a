"""Credentials through the whole program, with curl: the secret arrives at the server and is never inside."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from support.bound import BEARER, HOST, SECRET, authorizations, credential, curl, events, keep, policy
from support.cloister import BASE, User
from support.secure_server import Answer, SecureServer

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


def test_curl_with_a_placeholder_arrives_with_the_secret(user: User, workspace: Path, server: SecureServer) -> None:
    """The agent sends what stands in its variable; the server gets the secret; the record names the credential."""
    user.write_policy(policy(server.port, credential(keep(user), server.port)))
    done = user.inside(f'{curl(server.port, BEARER)}; echo; echo "$TOKEN"', cwd=workspace)
    said = user.run("receipt", "last", cwd=workspace).stdout
    logs = user.run("logs", "--events", "last", cwd=workspace).stdout

    assert done.stdout.startswith("hello\ncloister-token-"), done
    assert authorizations(server) == [f"Bearer {SECRET}"]
    assert user.receipts()[-1]["credentials"] == [f"token: 1 requests to {HOST}:{server.port}"]
    (event,) = events(user)
    assert (event["protocol"], event["method"], event["path"], event["status"]) == ("https", "GET", "/x", 200)
    assert event["credentials"] == ["token"]
    assert f"token: 1 requests to {HOST}" in said
    assert "with token" in logs
    (used,) = user.audited("credential.used")
    assert (used["credential"], used["endpoint"]["hostname"], used["agent"]) == ("token", HOST, "shell")
    assert SECRET not in json.dumps([*user.audited("egress.request"), used])
    user.close()


def test_http2_carries_it_too(user: User, workspace: Path, server: SecureServer) -> None:
    """A client that speaks HTTP/2 to the broker gets the same, whatever the server speaks."""
    user.write_policy(policy(server.port, credential(keep(user), server.port)))
    done = user.inside(curl(server.port, BEARER, "--http2", "-w", "'%{http_version}'"), cwd=workspace)

    assert done.stdout == "hello2", done
    assert authorizations(server) == [f"Bearer {SECRET}"]
    user.close()


FORMS = {
    "header": ({"scheme": "header", "header": "X-Api-Key"}, '-H "x-api-key: $TOKEN"', ("x-api-key", SECRET)),
    "value": (
        {"scheme": "header", "header": "Authorization", "value": "token {secret}"}, '-H "authorization: token $TOKEN"',
        ("authorization", f"token {SECRET}"),
    ),
    "basic": (
        {"scheme": "basic", "user": "me"}, '-u "whoever:$TOKEN"',
        ("authorization", "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(FORMS))
def test_forms(user: User, workspace: Path, server: SecureServer, kind: str) -> None:
    """Each scheme leaves in the policy's form, whatever the client wrote round the placeholder."""
    inject, words, (name, value) = FORMS[kind]
    user.write_policy(policy(server.port, credential(keep(user), server.port, **inject)))
    done = user.inside(curl(server.port, words), cwd=workspace)

    assert done.stdout == "hello", done
    assert server.sent[-1].headers[name] == value
    user.close()


def test_a_query_parameter_with_odd_characters(user: User, workspace: Path, server: SecureServer) -> None:
    """Characters with a meaning in addresses arrive as the secret has them; the record's path has no query."""
    secret = "odd&=%+ #ü/?:@"
    table = credential(keep(user, secret), server.port, scheme="query", query="key")
    user.write_policy(policy(server.port, table))
    done = user.inside(curl(server.port, path="/x?a=1&key='$TOKEN'&b=%2F"), cwd=workspace)

    assert done.stdout == "hello", done
    assert parse_qs(urlsplit(server.sent[-1].path).query) == {"a": ["1"], "key": [secret], "b": ["/"]}
    assert events(user)[0]["path"] == "/x"
    user.close()


def test_a_segment_of_the_path(user: User, workspace: Path, server: SecureServer) -> None:
    """A token that is a part of the path, as with Telegram: the server gets it, the record has its name."""
    secret = "123456:AA-made_up/odd"  # made up
    table = credential(keep(user, secret), server.port, scheme="path", value="bot{secret}")
    user.write_policy(policy(server.port, table))
    good = curl(server.port, path="/file/bot'$TOKEN'/a?b=%2F")
    elsewhere = curl(server.port, path="/getMe?token='$TOKEN'")
    own = curl(server.port, path="/bot1:own/getMe")
    done = user.inside(f"{good}; {elsewhere}; {own}", cwd=workspace)

    assert done.stdout.startswith("hello"), done
    assert "placeholder" in done.stdout
    assert [sent.path for sent in server.sent] == ["/file/bot123456:AA-made_up%2Fodd/a?b=%2F", "/bot1:own/getMe"]
    assert events(user)[0]["path"] == "/file/bot{token}/a"
    assert [(event["name"], event["what"]) for event in events(user, "credential")] == [("token", "own-value")]
    user.close()


def test_without_a_variable_it_is_put_in(user: User, workspace: Path, server: SecureServer) -> None:
    """A credential without `env` needs nothing inside; a value of the agent's own is left alone, and recorded."""
    user.write_policy(policy(server.port, credential(keep(user), server.port, env="")))
    own = '-H "Authorization: Bearer mine"'
    done = user.inside(f"{curl(server.port)}; {curl(server.port, own)}; env", cwd=workspace)

    assert done.stdout.startswith("hellohello"), done
    assert authorizations(server) == [f"Bearer {SECRET}", "Bearer mine"]
    assert "cloister-token" not in done.stdout
    assert [(event["name"], event["what"]) for event in events(user, "credential")] == [("token", "own-value")]
    assert user.receipts()[-1]["credentials"] == [f"token: 1 requests to {HOST}:{server.port}"]
    user.close()


def test_a_variable_means_that_nothing_is_put_in_unasked(user: User, workspace: Path, server: SecureServer) -> None:
    """The twin: with `env`, a request without the placeholder stays without the secret."""
    user.write_policy(policy(server.port, credential(keep(user), server.port)))
    done = user.inside(curl(server.port), cwd=workspace)

    assert done.stdout == "hello"
    assert authorizations(server) == [""]
    assert user.receipts()[-1]["credentials"] == ["token: not used"]
    user.close()


def test_methods_and_paths_limit_it(user: User, workspace: Path, server: SecureServer) -> None:
    """The secret goes with the methods and paths of its policy only; without it, other requests pass."""
    table = credential(keep(user), server.port, methods=["GET"], paths=["/repos/**"])
    user.write_policy(policy(server.port, table))
    words = (BEARER, "-w", "'%{http_code} '", "-o", "/dev/null")
    script = "; ".join(
        (
            curl(server.port, *words, path="/repos/a?page=2"),
            curl(server.port, *words, "-X", "DELETE", path="/repos/a"),
            curl(server.port, *words, path="/user"),
            curl(server.port, *words, "--path-as-is", path="/repos/../user"),
            curl(server.port, *words[1:], path="/user"),
        )
    )
    done = user.inside(script, cwd=workspace)

    assert done.stdout.split() == ["200", "403", "403", "403", "200"], done
    assert [(sent.path, bool(sent.headers.get("authorization"))) for sent in server.sent] == [
        ("/repos/a?page=2", True),
        ("/user", False),
    ]
    assert {event["reason"] for event in events(user)} >= {"credential-not-for-this-request"}
    user.close()


def test_no_method_echoes_it(user: User, workspace: Path, server: SecureServer) -> None:
    """TRACE answers with the request as the server got it, so no secret goes with it, asked for or not."""
    user.write_policy(policy(server.port, credential(keep(user), server.port)))
    asked = user.inside(curl(server.port, BEARER, "-X", "TRACE"), cwd=workspace)
    user.write_policy(policy(server.port, credential(keep(user), server.port, env="")))
    user.inside(curl(server.port, "-X", "TRACE"), cwd=workspace)

    assert "credential-not-for-this-request" in asked.stdout
    assert authorizations(server) == [""]
    user.close()


def test_an_echo_is_masked(user: User, workspace: Path, server: SecureServer) -> None:
    """A bound host that shows what it was sent shows stars, where `mask` is on: in body and header, encoded too."""
    server.answer = lambda sent: Answer(
        body=repr(sent.headers).encode(), headers={"x-echo": sent.headers["authorization"]}
    )
    table = credential(keep(user), server.port, scheme="basic", user="me", mask=True)
    user.write_policy(policy(server.port, table))
    done = user.inside(curl(server.port, "-i", "-u", '"x:$TOKEN"'), cwd=workspace)

    encoded = base64.b64encode(f"me:{SECRET}".encode()).decode()
    assert encoded in server.sent[-1].headers["authorization"]
    assert encoded not in done.stdout
    assert f"x-echo: Basic {'*' * len(encoded)}" in done.stdout
    assert "200" in done.stdout.splitlines()[0]
    user.close()


@pytest.mark.parametrize("spelled", ["HOST.cloister.INTERNAL", f"{HOST}."])
def test_other_spellings_of_the_host(user: User, workspace: Path, server: SecureServer, spelled: str) -> None:
    """Capitals and a closing dot are the same host: the secret goes there, and no spelling slips past the rules."""
    user.write_policy(policy(server.port, credential(keep(user), server.port)))
    done = user.inside(curl(server.port, BEARER, host=spelled), cwd=workspace)

    assert done.stdout == "hello", done
    assert authorizations(server) == [f"Bearer {SECRET}"]
    user.close()


def test_a_bound_host_needs_egress(user: User, workspace: Path, server: SecureServer) -> None:
    """A credential opens no host: without a rule the request is refused, and `check` says so beforehand."""
    user.write_policy(f"{BASE}{credential(keep(user), server.port)}")
    checked = user.run("check", cwd=workspace)
    done = user.inside(curl(server.port, BEARER), cwd=workspace)

    assert "may not reach" in checked.stdout
    assert checked.returncode == 0
    assert not server.sent
    assert done.returncode != 0
    user.close()


# --- the life of a secret ---------------------------------------------------------------------


def test_rotation_counts_at_the_next_request(user: User, workspace: Path, server: SecureServer) -> None:
    """The next request of a living run uses a new secret of the file; a missing one is refused, and why is logged."""
    reference = keep(user)
    user.write_policy(policy(server.port, credential(reference, server.port)))
    started = user.run("run", "--detach", "shell", "--", "sleep", "60", cwd=workspace)
    run = started.stdout.strip()

    def fetch() -> str:
        return user.run("exec", run, "--", "sh", "-c", curl(server.port, BEARER), cwd=workspace).stdout

    first = fetch()
    keep(user, "second-value")
    second = fetch()
    (user.home / ".config/cloister/token").unlink()
    third = fetch()
    keep(user, "fourth-value")
    fourth = fetch()
    user.run("stop", run, cwd=workspace)

    assert (first, second, fourth) == ("hello", "hello", "hello")
    assert authorizations(server) == [f"Bearer {value}" for value in (SECRET, "second-value", "fourth-value")]
    assert '"reason":"secret-unavailable"' in third
    assert "no such file" not in third
    assert "no such file" in events(user, "credential")[0]["why"]
    user.close()


def test_a_credential_taken_back_fails_at_once(user: User, workspace: Path, server: SecureServer) -> None:
    """Removed from the policy and reloaded, a living run cannot use it any more; put back, it can."""
    with_it = policy(server.port, credential(keep(user), server.port))
    user.write_policy(with_it)
    run = user.run("run", "--detach", "shell", "--", "sleep", "60", cwd=workspace).stdout.strip()

    def fetch() -> str:
        return user.run("exec", run, "--", "sh", "-c", curl(server.port, BEARER), cwd=workspace).stdout

    before = fetch()
    user.write_policy(policy(server.port))
    told = user.run("policy", "reload", cwd=workspace).stdout
    revoked = fetch()
    user.write_policy(with_it)
    user.run("policy", "reload", cwd=workspace)
    after = fetch()
    user.run("stop", run, cwd=workspace)

    assert (before, after) == ("hello", "hello")
    assert "credentials taken back: token" in told
    assert '"reason":"credential-revoked"' in revoked
    assert len(server.sent) == 2
    assert events(user, "credentials-revoked")[0]["names"] == ["token"]
    user.close()


def test_what_is_open_with_it_is_cut(user: User, workspace: Path, server: SecureServer) -> None:
    """A request that waits for its answer when its credential is taken back gets the refusal instead."""
    server.answer = lambda sent: Answer() if sent.path == "/quick" else time.sleep(30) or Answer()
    user.write_policy(policy(server.port, credential(keep(user), server.port)))
    run = user.run("run", "--detach", "shell", "--", "sleep", "60", cwd=workspace).stdout.strip()
    waits = user.start("exec", run, "--", "sh", "-c", curl(server.port, BEARER), cwd=workspace)
    plain = user.start("exec", run, "--", "sh", "-c", curl(server.port, path="/plain"), cwd=workspace)
    for _ in range(200):
        if len(server.sent) > 1:
            break
        time.sleep(0.05)
    user.write_policy(policy(server.port))
    user.run("policy", "reload", cwd=workspace)
    said, _ = waits.communicate(timeout=15)
    unharmed = plain.poll() is None
    user.run("stop", run, cwd=workspace)
    plain.communicate(timeout=15)

    assert b'"reason":"credential-revoked"' in said
    assert unharmed
    user.close()


def test_a_command_is_asked_again_after_a_401(user: User, workspace: Path, server: SecureServer) -> None:
    """What a command printed is kept while it works; a 401 of the bound host has it asked anew, though not at once."""
    script = user.home / "token.sh"
    script.write_text(f"#!/bin/sh\necho x >> {user.home}/asked; echo token-$(wc -l < {user.home}/asked)\n")
    script.chmod(0o755)
    user.write_policy(policy(server.port, credential("command:~/token.sh", server.port)))
    server.answer = lambda sent: Answer(401 if sent.path == "/no" else 200)
    first, second = curl(server.port, BEARER), curl(server.port, BEARER, path="/no")
    done = user.inside(f"{first}; {second}; {first}; sleep 10; {second}; {first}", cwd=workspace)

    assert done.returncode == 0
    assert authorizations(server) == [f"Bearer token-{number}" for number in (1, 1, 1, 1, 2)]
    user.close()


def test_env_is_that_of_whoever_starts_the_run(user: User, workspace: Path, server: SecureServer) -> None:
    """`env:` means the caller's variable at the start, also while a broker from another environment answers."""
    user.write_policy(policy(server.port, credential("env:MY_TOKEN", server.port)))
    words = ("run", "shell", "--", "sh", "-c", f"{curl(server.port, BEARER)}; env")
    for value in ("first-value", "second-value"):
        done = user.run(*words, cwd=workspace, MY_TOKEN=value)
        assert value not in done.stdout
    missing = user.run(*words, cwd=workspace)

    assert authorizations(server) == ["Bearer first-value", "Bearer second-value"]
    assert missing.returncode == 125
    assert "export MY_TOKEN" in missing.stderr
    user.close()


def test_a_secret_that_cannot_be_had_refuses_the_start(user: User, workspace: Path, server: SecureServer) -> None:
    """Nothing is started or recorded; the message names the reference; with the secret there, the same run starts."""
    user.write_policy(policy(server.port, credential("file:~/.config/cloister/token", server.port)))
    missing = user.inside("true", cwd=workspace)
    keep(user, "line\nbreak")
    broken = user.inside("true", cwd=workspace)
    keep(user)
    (user.home / ".config/cloister/token").chmod(0o644)
    opened = user.inside("true", cwd=workspace)
    (user.home / ".config/cloister/token").chmod(0o600)

    for done, word in ((missing, "no such file"), (broken, "line breaks"), (opened, "chmod 600")):
        assert done.returncode == 125
        assert word in done.stderr
        assert "file:~/.config/cloister/token" in done.stderr
    assert not user.records()
    assert user.inside("true", cwd=workspace).returncode == 0
    user.close()


# --- what the policy says, before anything starts ------------------------------------------------


def test_a_secret_that_the_sandbox_would_show_refuses_the_start(user: User, workspace: Path) -> None:
    """In the workspace, below `read`, or behind a link from there; hidden, it starts. `check` warns of what it sees."""
    inside, shown = workspace / "token", user.home / "shown/token"
    shown.parent.mkdir()
    for path in (inside, shown):
        path.touch(mode=0o600)
        path.write_text(SECRET)
    read = f'[agents.shell.filesystem]\nread = ["{shown.parent}"]\n'
    answers = {}
    for name, reference, more in (
        ("workspace", f"file:{inside}", ""),
        ("read", f"file:{shown}", read),
        ("elsewhere", f"file:{shown}", ""),
        ("hidden", f"file:{shown}", read + f'hide = ["{shown}"]\n'),
    ):
        user.write_policy(f"{BASE}{more}{credential(reference, 443)}")
        answers[name] = user.inside("true", cwd=workspace)
        if name == "read":
            assert "will not start" in user.run("check", cwd=workspace).stdout

    assert {name: done.returncode for name, done in answers.items()} == {
        "workspace": 125, "read": 125, "elsewhere": 0, "hidden": 0,
    }  # fmt: skip
    assert "secret-visible" in answers["workspace"].stderr
    assert "filesystem.hide" in answers["read"].stderr
    user.close()


def test_one_variable_is_given_once(user: User, workspace: Path) -> None:
    """A variable that two parts of the policy set is a mistake, and so is carrying the real one in beside it."""
    two = credential(keep(user), 443) + credential(keep(user), 444, name="second")
    for more, tables in (("", two), ('pass_environment = ["TOKEN"]\n', credential(keep(user), 443))):
        user.write_policy(f"{BASE}{more}{tables}")
        checked = user.run("check", cwd=workspace)
        assert checked.returncode == 78
        assert "the variable TOKEN is set by" in checked.stderr
    user.write_policy(f"{BASE}{credential(keep(user), 443)}")
    asked = user.run("run", "--env", "TOKEN", "shell", "--", "env", cwd=workspace, TOKEN="real-one")

    assert asked.returncode == 125
    assert "TOKEN" in asked.stderr
    user.close()


def test_plan_and_explain_speak_of_it(user: User, workspace: Path) -> None:
    """The plan names reference, host, form and variable; `explain` that TLS ends here; neither reads the secret."""
    table = credential("file:~/missing", 443, host="api.example.org", methods=["GET"])
    user.write_policy(f'{BASE}[agents.shell.egress]\nallow = ["api.example.org"]\n{table}')
    plan = user.run("plan", "shell", cwd=workspace).stdout
    explained = user.run("explain", "shell", "api.example.org", cwd=workspace).stdout
    other = user.run("explain", "shell", "other.example.org", cwd=workspace).stdout

    words = (
        "token: file:~/missing; to api.example.org:443; as Authorization: Bearer; placeholder in TOKEN; for GET only"
    )
    assert words in plan
    assert "SSL_CERT_FILE" in plan
    assert re.search(r"credentials +token", explained)
    assert "https GET /" in explained
    assert "credentials" not in other
    user.close()


def test_runs_without_credentials_are_as_before(user: User, workspace: Path) -> None:
    """No bundle, no variables, no authority: nothing of this is there for a run that has no credentials."""
    done = user.inside("env; ls /run/cloister/box", cwd=workspace)

    assert "SSL_CERT_FILE" not in done.stdout
    assert "ca.pem" not in done.stdout
    assert not (user.state / "authority").exists()
    user.close()


def test_what_inside_trusts_is_the_system_and_one_more(user: User, workspace: Path) -> None:
    """The bundle holds the system's certificates and ours; the key of ours is in no file inside, and 0600 outside."""
    user.write_policy(f"{BASE}{credential(keep(user), 443)}")
    done = user.inside(
        "cat $SSL_CERT_FILE; ls -la /run/cloister/box; grep -rl 'PRIVATE KEY' /run /etc $HOME", cwd=workspace
    )
    system = Path("/etc/ssl/certs/ca-certificates.crt").read_text().count("BEGIN CERT")
    kept = user.state / "authority/authority.pem"

    assert done.stdout.count("BEGIN CERTIFICATE") == system + 1
    assert "PRIVATE KEY" not in done.stdout
    assert "/authority" not in done.stdout
    assert kept.stat().st_mode & 0o777 == 0o600
    assert "PRIVATE KEY" in kept.read_text()
    described = subprocess.run(
        ["openssl", "x509", "-noout", "-text"], input=kept.read_bytes(), capture_output=True, check=True, timeout=20
    )
    assert b"pathlen:0" in described.stdout
    user.close()
