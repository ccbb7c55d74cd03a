"""Two machines from one template, alive at once: what names or admits one of them is none of the other's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import jws
from support.bound import HOST, SECRET, authorizations, credential, keep
from support.fake_model import FakeModel
from support.guest_user import BOOT_S, GuestUser, Installs
from support.secure_server import SecureServer, TestAuthority

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]
SHOW = """
import json, os
print(json.dumps({
    "token": open(os.environ["CLOISTER_IDENTITY_TOKEN_FILE"]).read().strip(), "credential": os.environ["TOKEN"],
    "model": os.environ["CLOISTER_MODEL_KEY"], "cards": sorted(os.listdir("/sys/class/net")),
}))
"""
ASK = """
import json, sys, urllib.error, urllib.request as r
port, kind, word = sys.argv[1:]
url, body, headers = f"https://host.cloister.internal:{port}/x", None, {"Authorization": "Bearer " + word}
if kind == "model":
    url, headers["content-type"] = "http://127.0.0.1:11435/v1/chat/completions", "application/json"
    body = json.dumps({"model": "fake-1", "messages": [{"role": "user", "content": "hi"}]}).encode()
try:
    print(r.urlopen(r.Request(url, body, headers), timeout=60).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


@pytest.fixture
def authority(tmp_path: Path) -> TestAuthority:
    """An authority that the user's broker trusts."""
    return TestAuthority(tmp_path / "pki")


@pytest.fixture
def server(authority: TestAuthority) -> Iterator[SecureServer]:
    """A web server to which the bound host's name leads."""
    with SecureServer(authority.context(HOST)) as one:
        yield one


def test_no_two_clones_share_a_token(  # noqa: PLR0913  # fixtures
    image: Installs, home: Path, workspace: Path, authority: TestAuthority, server: SecureServer, fake_model: FakeModel
) -> None:
    """Identity tokens, placeholders of credentials and keys for models differ, and the other's admit to nothing."""
    user = GuestUser(home, image)
    user.environment["SSL_CERT_FILE"] = str(authority.file)
    key = keep(user, "made-up-upstream-key-5", "key")
    text = (home / ".config/cloister/cloister.toml").read_text().replace("warm = false", "warm = true")
    text += f'[agents.shell.egress]\nallow = ["{HOST}:{server.port}"]\n' + credential(keep(user), server.port)
    text += '[agents.shell.llm]\nproviders = ["fake"]\n[agents.shell.identity]\naudiences = ["vault"]\n'
    text += f'[providers.fake]\nprotocol = "openai"\nbase_url = "{fake_model.url}"\nkey = "{key}"\n'
    user.write_policy(text)
    made = user.run("vm", "warm", "shell", cwd=workspace, timeout_s=BOOT_S)
    assert made.returncode == 0, made.stderr

    def python(run: str, script: str, *words: str) -> str:
        done = user.run("exec", run, "--", "python3", "-", *words, cwd=workspace, stdin=script.encode(),
                        timeout_s=BOOT_S)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    runs = [user.begin("sleep 600", cwd=workspace) for _ in range(2)]
    plans = [json.loads((user.state / f"runs/{run}/plan.json").read_text()) for run in runs]
    seen = [json.loads(python(run, SHOW)) for run in runs]
    port = str(server.port)
    own = [python(runs[0], ASK, port, kind, seen[0][kind]) for kind in ("credential", "model")]
    foreign = [python(runs[0], ASK, port, kind, seen[1][kind]) for kind in ("credential", "model")]
    user.run("stop", *runs, cwd=workspace, timeout_s=BOOT_S)
    user.close()

    assert all(plan["steps"][-1]["vm"]["template"] for plan in plans), "both started from the template"
    claims = [json.loads(jws.unb64(one["token"].split(".")[1])) for one in seen]
    assert [one["sub"].rpartition("/")[2] for one in claims] == runs
    for kind in ("token", "credential", "model"):
        assert seen[0][kind] != seen[1][kind], kind
    assert claims[0]["jti"] != claims[1]["jti"]
    assert [one["cards"] for one in seen] == [["lo"], ["lo"]], "no card, so no MAC that could be shared"
    assert own == ["200", "200"]
    assert foreign[1] == "401", foreign
    assert len(fake_model.requests) == 1
    assert SECRET not in json.dumps(seen)
    assert authorizations(server).count(f"Bearer {SECRET}") == 1, "only for its own placeholder"
