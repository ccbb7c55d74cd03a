"""Identity through the whole program: a run's tokens, in its sandbox, from its start to after its end."""

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from support import jws
from support.cloister import BASE, User, wait_for
from support.imports import WatchedBroker

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

POLICY = BASE + '\n[agents.shell.identity]\naudiences = ["vault", "https://sts.example.org"]\n'
BOX = "/run/cloister/box/identity"
OWN = f"{BOX}/cloister.jwt"


@pytest.fixture
def user(user: User) -> User:
    """The user of the kernel tests, with a policy that names two audiences."""
    user.write_policy(POLICY)
    return user


def claims_of(token: str) -> dict[str, Any]:
    """Return what a token says, unproved."""
    return json.loads(jws.unb64(token.split(".")[1]))


def verify(user: User, workspace: Path, token: str, *words: str) -> str:
    """Return why `cloister identity verify` refuses a token; empty when it is good."""
    done = user.run("identity", "verify", "-", *words, cwd=workspace, stdin=token.encode())
    assert done.returncode in {0, 77}, done.stderr
    return "" if done.returncode == 0 else done.stderr.partition("[")[2].partition("]")[0]


def detached(user: User, workspace: Path) -> str:
    """Start a run that waits; return its id."""
    started = user.run("run", "--detach", "shell", "--", "sleep", "300", cwd=workspace)
    assert started.returncode == 0, started.stderr
    return started.stdout.strip()


def read(user: User, workspace: Path, run: str, path: str = OWN) -> str:
    """Return a file as the run sees it."""
    return user.run("exec", run, "--", "cat", path, cwd=workspace).stdout


def eventually(condition: Any, timeout_s: float = 20) -> bool:
    """Wait until something is so."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.25)
    return False


def test_a_run_finds_tokens_that_the_world_can_verify_and_that_die_with_it(user: User, workspace: Path) -> None:
    """One file per audience and one of our own; good while it runs, by the JWKS alone; void afterwards."""
    run = detached(user, workspace)
    index = json.loads(read(user, workspace, run, f"{BOX}/index.json"))
    tokens = {audience: read(user, workspace, run, f"{BOX}/{name}") for audience, name in index.items()}
    variables = user.run("exec", run, "--", "env", cwd=workspace).stdout.splitlines()
    jwks = json.loads(user.run("identity", "jwks", cwd=workspace).stdout)

    assert set(tokens) == {"cloister", "vault", "https://sts.example.org"}
    assert {f"CLOISTER_IDENTITY_TOKEN_FILE={OWN}", f"CLOISTER_IDENTITY_DIRECTORY={BOX}"} <= set(variables)
    plan = json.loads((user.state / f"runs/{run}/plan.json").read_text())
    for audience, token in tokens.items():
        claims = jws.read_by_jwks(token, jwks)
        assert claims is not None
        assert (claims["aud"], claims["run"], claims["agent"]) == (audience, run, "shell")
        assert claims["sub"].endswith(f"/agent/shell/run/{run}")
        assert claims["policy"] == plan["policy_digest"]
        assert 0 < claims["exp"] - claims["iat"] <= 900
        assert verify(user, workspace, token, "--audience", audience, "--run", run) == ""
    assert verify(user, workspace, tokens["vault"]) == "token-audience"
    user.run("stop", run, cwd=workspace)
    assert eventually(lambda: not (user.runtime / f"cloister/runs/{run}").exists())

    assert eventually(lambda: verify(user, workspace, tokens["cloister"]) == "token-revoked")
    for path in user.state.rglob("*"):
        if path.is_file():
            assert not any(token.split(".")[2].encode() in path.read_bytes() for token in tokens.values()), path
    issued = user.audited("identity.issued")
    assert {one["details"]["audience"] for one in issued} == set(tokens)
    assert {one["run"] for one in issued} == {run}
    user.close()


def test_tokens_are_read_only_and_no_other_runs_tokens_are_seen(user: User, workspace: Path) -> None:
    """The agent reads its own and changes nothing; another run has others, and sees only those."""
    first, second = detached(user, workspace), detached(user, workspace)
    script = f"echo x > {OWN}; rm -f {OWN}; ln -s /etc/passwd {BOX}/x; mv {OWN} {BOX}/y; chmod 777 {BOX}; touch {BOX}/z"
    tried = user.run("exec", first, "--", "sh", "-c", script, cwd=workspace)
    mine, theirs = read(user, workspace, first), read(user, workspace, second)
    listed = user.run("exec", second, "--", "sh", "-c", "grep -rl eyJ / --include=*.jwt 2>/dev/null", cwd=workspace)

    assert tried.stderr.count("Read-only file system") >= 4
    assert (claims_of(mine)["run"], claims_of(theirs)["run"]) == (first, second)
    assert {line.rpartition("/")[0] for line in listed.stdout.split()} == {BOX}
    assert verify(user, workspace, mine, "--run", second) == "token-run"
    assert verify(user, workspace, theirs, "--run", second) == ""
    for run in (first, second):
        user.run("stop", run, cwd=workspace)
    user.close()


def test_tokens_are_renewed_and_never_seen_half_written(user: User, workspace: Path) -> None:
    """With a life of a minute a new one stands there after 20 s; a reader that never rests sees whole ones only."""
    user.write_policy(POLICY + 'lifetime = "1m"\n')
    script = (
        "import os, time, json\n"
        "seen, until, bad = [], time.time() + 28, 0\n"
        f"while time.time() < until:\n    text = open({OWN!r}).read()\n"
        "    bad += text.count('.') != 2 or len(text.rpartition('.')[2]) != 86\n"
        "    if text not in seen: seen.append(text)\n    time.sleep(0.002)\n"
        f"print(json.dumps([bad, seen, os.listdir({BOX!r})]))\n"
    )
    done = user.run("run", "shell", "--", "python3", "-c", script, cwd=workspace)
    bad, seen, names = json.loads(done.stdout)

    assert bad == 0
    assert len(seen) == 2
    assert claims_of(seen[1])["iat"] - claims_of(seen[0])["iat"] >= 20
    assert claims_of(seen[0])["exp"] - claims_of(seen[0])["iat"] == 60
    assert claims_of(seen[0])["jti"] != claims_of(seen[1])["jti"]
    assert sorted(names) == sorted(["cloister.jwt", "vault.jwt", "index.json", *(n for n in names if "sts" in n)])
    user.close()


def test_a_run_cannot_ask_the_service_for_anything(user: User, workspace: Path) -> None:
    """Outside the service issues for a living run; inside neither its port nor its socket can be reached."""
    service = user.start("identity", "serve", "--port", "0", cwd=workspace)
    assert service.stdout is not None
    assert select.select([service.stdout], [], [], 20)[0]
    port = int(service.stdout.readline().split(b" ")[1].rpartition(b":")[2])
    run = detached(user, workspace)
    path = user.runtime / "cloister/identity.sock"
    asked = json.dumps({"run": run, "audience": "vault"})
    outside = subprocess.run(
        ["curl", "-sS", "-m", "10", "--unix-socket", str(path), "-H", "Content-Type: application/json", "-d", asked,
         "http://localhost/v1/tokens"], capture_output=True, text=True, check=True,
    )  # fmt: skip
    issued = json.loads(outside.stdout)["token"]
    inside = user.run(
        "exec", run, "--", "sh", "-c",
        f"curl -sS -m 5 http://127.0.0.1:{port}/healthz; curl -sS -m 5 -x http://127.0.0.1:3128 "
        f"-H \"Authorization: Bearer $(cat {OWN})\" -H 'Content-Type: application/json' -d '{asked}' "
        f"http://127.0.0.1:{port}/v1/tokens; curl -sS -m 5 --unix-socket {path} http://localhost/v1/tokens; "
        "find / -name 'identity.sock' -o -name 'store.json' -path '*identity*' 2>/dev/null",
        cwd=workspace,
    )  # fmt: skip
    service.send_signal(signal.SIGTERM)
    assert service.wait(20) == 0
    service.stdout.close()
    assert service.stderr is not None
    service.stderr.close()

    assert claims_of(issued)["run"] == run
    assert verify(user, workspace, issued, "--audience", "vault") == ""
    assert "eyJ" not in inside.stdout
    assert '"status":"ok"' not in inside.stdout
    assert "identity.sock" not in inside.stdout
    assert "store.json" not in inside.stdout
    assert inside.stderr.count("curl: ") >= 2
    user.run("stop", run, cwd=workspace)
    user.close()


def test_what_a_person_revokes_is_gone_from_the_living_run(user: User, workspace: Path) -> None:
    """A run loses its tokens and gets no more; a key's run gets tokens of a new key; the run itself goes on."""
    run = detached(user, workspace)
    token = read(user, workspace, run)
    kid = json.loads(jws.unb64(token.split(".")[0]))["kid"]
    assert user.run("identity", "revoke", "key", kid, cwd=workspace).returncode == 0
    assert verify(user, workspace, token) == "token-key"
    assert eventually(lambda: verify(user, workspace, read(user, workspace, run)) == "")
    fresh = read(user, workspace, run)
    assert user.run("identity", "revoke", "run", run, cwd=workspace).returncode == 0
    assert verify(user, workspace, fresh) == "token-revoked"

    assert eventually(lambda: read(user, workspace, run) == "")
    assert user.run("exec", run, "--", "ls", BOX, cwd=workspace).stdout == ""
    events = (user.state / f"runs/{run}/events.jsonl").read_text()
    assert '"identity-ended"' in events
    assert '"run-revoked"' in events
    user.run("stop", run, cwd=workspace)
    user.close()


def test_a_reloaded_policy_takes_audiences_away_at_once(user: User, workspace: Path) -> None:
    """The file goes, its token is void, what stays says the new policy; an audience that is new is not given."""
    run = detached(user, workspace)
    own, vault = read(user, workspace, run), read(user, workspace, run, f"{BOX}/vault.jwt")
    user.write_policy(BASE + '\n[agents.shell.identity]\naudiences = ["https://sts.example.org", "new"]\n')
    done = user.run("policy", "reload", "--json", cwd=workspace)
    digest = json.loads(done.stdout)["reloaded"][0]["policy"]
    index = json.loads(read(user, workspace, run, f"{BOX}/index.json"))
    fresh = read(user, workspace, run)

    assert set(index) == {"cloister", "https://sts.example.org"}
    assert read(user, workspace, run, f"{BOX}/vault.jwt") == ""
    assert verify(user, workspace, vault, "--audience", "vault") == "token-revoked"
    assert verify(user, workspace, own) == "", "it was good for its audience, and still says its own policy"
    assert verify(user, workspace, own, "--require-digest", digest) == "token-policy"
    assert verify(user, workspace, fresh, "--require-digest", digest) == ""
    user.write_policy(BASE)
    user.run("policy", "reload", cwd=workspace)
    assert user.run("exec", run, "--", "ls", BOX, cwd=workspace).stdout == ""
    assert verify(user, workspace, fresh) == "token-revoked"
    user.run("stop", run, cwd=workspace)
    user.close()


def test_tokens_of_a_killed_broker_are_void_when_the_next_one_starts(user: User, workspace: Path) -> None:
    """`kill -9` of the broker ends the run; recovery revokes its tokens."""
    run = detached(user, workspace)
    token = read(user, workspace, run)
    descriptor = os.pidfd_open(user.broker_pid)
    os.kill(user.broker_pid, signal.SIGKILL)
    wait_for(descriptor)
    os.close(descriptor)
    assert user.inside("true", cwd=workspace).returncode == 0

    assert verify(user, workspace, token) == "token-revoked"
    user.close()


def test_a_run_without_audiences_has_no_tokens_and_costs_nothing(user: User, workspace: Path) -> None:
    """No key store, no files, no variable, and the broker has loaded neither cryptography nor JWT; the twin has all."""
    user.write_policy(BASE)
    with WatchedBroker(user) as broker:
        done = user.inside(f"env; ls {BOX}", cwd=workspace)
        plain, kept = broker.loaded(), (user.state / "identity").exists()
        user.write_policy(POLICY)
        token = user.inside(f"cat {OWN}", cwd=workspace).stdout
        with_tokens = broker.loaded()

    assert "CLOISTER_IDENTITY" not in done.stdout
    assert "No such file" in done.stderr
    assert not kept
    assert not {"cryptography", "jwt"} & plain
    assert token.startswith("eyJ")
    assert {"cryptography", "jwt"} <= with_tokens


def test_without_its_master_key_nothing_starts(user: User, workspace: Path) -> None:
    """The start is refused before anything is done; with the key back it works, and tokens of before verify."""
    first = user.inside(f"cat {OWN}", cwd=workspace).stdout
    key = user.state / "identity/master.key"
    content = key.read_text()
    key.unlink()
    user.close()
    user.runtime.mkdir(mode=0o700)
    refused = user.inside("echo started", cwd=workspace)
    key.write_text(content)
    key.chmod(0o600)
    again = user.inside("echo started", cwd=workspace)

    assert (refused.returncode, refused.stdout) == (125, "")
    assert "master-key-missing" in refused.stderr
    assert content.strip() not in refused.stderr
    assert again.stdout == "started\n"
    assert verify(user, workspace, first) == "token-revoked"
    assert len(user.receipts()) == 2
    user.close()


def test_the_master_key_in_the_environment_reaches_no_child(user: User, workspace: Path) -> None:
    """The broker takes it from its environment; neither the sandbox nor a program of the broker has it."""
    master = "0e" * 32
    user.environment["CLOISTER_MASTER_KEY"] = master
    script = f"cat {OWN}; env; cat /proc/*/environ | tr '\\0' '\\n'"
    done = user.inside(script, cwd=workspace)

    assert done.stdout.startswith("eyJ")
    assert master not in done.stdout + done.stderr
    assert not (user.state / "identity/master.key").exists()
    for path in user.state.rglob("*"):
        assert not path.is_file() or master.encode() not in path.read_bytes(), path
    user.close()


def test_the_verb_shows_rotates_and_changes_the_master_key(user: User, workspace: Path) -> None:
    """Each action through the command line, as text and as JSON; living tokens survive both rotations."""
    run = detached(user, workspace)
    token = read(user, workspace, run)
    shown = json.loads(user.run("identity", "show", "--json", cwd=workspace).stdout)
    rotated = json.loads(user.run("identity", "rotate", "--all", "--json", cwd=workspace).stdout)
    master = user.run("identity", "rotate-master", cwd=workspace)
    text = user.run("identity", "show", cwd=workspace).stdout
    wrong = user.run("identity", "revoke", "key", "nothing", cwd=workspace)

    assert [key["agent"] for key in shown["keys"]] == ["shell"]
    assert rotated == {"rotated": ["shell"]}
    assert master.returncode == 0
    assert "retired, still published" in text
    assert "generated" in text
    assert wrong.returncode == 64
    assert verify(user, workspace, token) == ""
    assert verify(user, workspace, read(user, workspace, run)) == ""
    assert user.run("identity", "configure", "--issuer", "https://id.example.org", cwd=workspace).returncode == 0
    assert verify(user, workspace, token) == "token-issuer"
    assert eventually(lambda: claims_of(read(user, workspace, run))["iss"] == "https://id.example.org")
    user.run("stop", run, cwd=workspace)
    user.close()
