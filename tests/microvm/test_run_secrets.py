"""What a guest may use without holding it: credentials, models, tokens. The same broker serves them, outside."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import jws
from support.bound import HOST, SECRET, authorizations, credential, keep
from support.fake_model import FakeModel
from support.guest_user import BOOT_S, GuestUser, Installs
from support.secure_server import SecureServer, TestAuthority

_MODEL_KEY = "made-up-upstream-key-3"
_ASK = """
import json, os, ssl, sys, urllib.request as r
def get(url, body=None, **headers):
    return r.urlopen(r.Request(url, body, headers), timeout=60).read().decode()
port = sys.argv[1]
print(get(f"https://host.cloister.internal:{port}/x", Authorization="Bearer " + os.environ["TOKEN"]))
ask = {"model": "fake-1", "messages": [{"role": "user", "content": "hi"}]}
key = os.environ["CLOISTER_MODEL_KEY"]
body = json.dumps(ask).encode()
print(get("http://127.0.0.1:11435/v1/chat/completions", body, Authorization="Bearer " + key,
          **{"content-type": "application/json"}))
print(open(os.environ["CLOISTER_IDENTITY_TOKEN_FILE"]).read())
"""


@pytest.fixture
def authority(tmp_path: Path) -> TestAuthority:
    """An authority that the user's broker trusts, and nothing besides."""
    return TestAuthority(tmp_path / "pki")


@pytest.fixture
def server(authority: TestAuthority) -> Iterator[SecureServer]:
    """A web server to which the bound host's name leads."""
    with SecureServer(authority.context(HOST)) as one:
        yield one


def test_secrets_stay_outside_and_work(  # noqa: PLR0913  # fixtures
    image: Installs, home: Path, workspace: Path, authority: TestAuthority, server: SecureServer, fake_model: FakeModel
) -> None:
    """A placeholder arrives as the secret, a model call with the provider's key; a token names the run."""
    user = GuestUser(home, image)
    user.environment["SSL_CERT_FILE"] = str(authority.file)
    key = keep(user, _MODEL_KEY, "key")
    provider = f'[providers.fake]\nprotocol = "openai"\nbase_url = "{fake_model.url}"\nkey = "{key}"\n'
    text = (home / ".config/cloister/cloister.toml").read_text()
    text += f'[agents.shell.egress]\nallow = ["{HOST}:{server.port}"]\n' + credential(keep(user), server.port)
    text += '[agents.shell.llm]\nproviders = ["fake"]\n[agents.shell.identity]\naudiences = ["vault"]\n' + provider
    user.write_policy(text)
    run = user.begin("sleep 600", cwd=workspace)
    asked = user.run("exec", run, "--", "python3", "-", str(server.port), cwd=workspace, stdin=_ASK.encode(),
                     timeout_s=BOOT_S)  # fmt: skip
    looked = user.exec(run, "env; cat /run/cloister/box/* /run/cloister/box/*/* 2>/dev/null", cwd=workspace)
    token = user.exec(run, "cat $CLOISTER_IDENTITY_TOKEN_FILE", cwd=workspace).stdout
    user.run("stop", run, cwd=workspace, timeout_s=BOOT_S)
    receipt = user.receipts()[-1]
    user.close()

    assert asked.stdout.startswith("hello\n"), asked.stderr
    assert "FAKE-OK" in asked.stdout
    assert authorizations(server) == [f"Bearer {SECRET}"]
    assert [request.headers["authorization"] for request in fake_model.requests] == [f"Bearer {_MODEL_KEY}"]
    assert SECRET not in looked.stdout
    assert _MODEL_KEY not in looked.stdout
    assert json.loads(jws.unb64(token.split(".")[1]))["sub"].endswith(run)
    assert receipt["credentials"] == [f"token: 1 requests to {HOST}:{server.port}"]


@pytest.mark.slow
def test_renewed_tokens_reach_the_guest(image: Installs, home: Path, workspace: Path) -> None:
    """A token that is renewed outside is another one inside, with no restart, under the same name."""
    user = GuestUser(home, image, '[agents.shell.identity]\naudiences = ["vault"]\nlifetime = "1m"\n')
    run = user.begin("sleep 600", cwd=workspace)
    show = "cat $CLOISTER_IDENTITY_TOKEN_FILE; ls -l /run/cloister/box/identity >&2"
    first = user.exec(run, show, cwd=workspace)
    until, second = time.monotonic() + 90, first
    while second.stdout == first.stdout and time.monotonic() < until:
        time.sleep(3)
        second = user.exec(run, show, cwd=workspace)
    user.run("stop", run, cwd=workspace, timeout_s=BOOT_S)
    user.close()

    assert first.stdout.count(".") == second.stdout.count(".") == 2, first.stderr
    assert first.stdout != second.stdout
