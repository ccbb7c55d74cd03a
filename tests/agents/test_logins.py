"""Real agents with a login whose tokens only the broker holds: they find placeholders in their own files, and work."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cloister.credentials import logins as kept_logins
from cloister.credentials.oauth_answers import read_token_answer
from cloister.host.logins import Shelf
from cloister.policy.presets import builtin_preset
from support.cloister import User
from support.fake_model import FakeModel
from support.fake_oauth import FakeOauth, make_certificate, over_tls
from support.model_wire import Run, Say

pytestmark = pytest.mark.agents
HOST = "host.cloister.internal"
POLICY = """\
schema = 1

[agents.{name}]
preset = "{name}"
environment = {{ {environment} }}
egress = {{ allow = ["{host}:{port}"], preset_hosts = false }}

[agents.{name}.credentials.login]
secret = "login:work"
inject = {{ host = "{host}", port = {port}, scheme = "bearer" }}
"""


class Product(NamedTuple):
    """How a product is pointed at the fake model."""

    name: str
    words: tuple[str, ...]
    environment: str
    tokens: tuple[str, ...]
    """Where tokens stand in its file."""


PRODUCTS = {
    "claude": Product(
        "claude",
        ("--dangerously-skip-permissions", "-p", "hi"),
        'ANTHROPIC_BASE_URL = "{url}"',
        ("claudeAiOauth", "accessToken"),
    ),
    "codex": Product(
        "codex",
        (
            *("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
            *("-c", 'openai_base_url="{url}/v1"', "-c", 'chatgpt_base_url="{url}/backend-api"', "-c", 'model="fake-1"'),
            # With a ChatGPT login it would compress what it sends, which the fake model does not read.
            *("-c", "features.enable_request_compression=false", "-c", "features.plugins=false", "hi"),
        ),
        'RUST_LOG = "error"',
        ("tokens", "access_token"),
    ),
}


@pytest.fixture(params=PRODUCTS.values(), ids=PRODUCTS.keys())
def product(request: pytest.FixtureRequest) -> Product:
    """Return each product in turn."""
    return request.param


@pytest.fixture
def provider() -> Iterator[FakeOauth]:
    """A provider of tokens."""
    with FakeOauth() as provider:
        provider.extra = {"id_token": ""}
        yield provider


@pytest.fixture
def user(  # noqa: PLR0913  # fixtures
    product: Product, agents_bin: Path, home: Path, tmp_path: Path, fake_model: FakeModel, provider: FakeOauth,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[User]:  # fmt: skip
    """A user who is logged in; the model is behind TLS, and the policy lets the agent reach nothing else."""
    monkeypatch.setenv("CLOISTER_TEST_PATH", f"{agents_bin}:/usr/local/bin:/usr/bin:/bin")
    authority, certificate = make_certificate(tmp_path, HOST)
    with over_tls(fake_model._server.RequestHandlerClass, certificate, model=fake_model) as port:
        url = f"https://{HOST}:{port}"
        environment = product.environment.format(url=url)
        user = User(home, POLICY.format(name=product.name, environment=environment, host=HOST, port=port))
        user.environment["SSL_CERT_FILE"] = str(authority)
        user.words = [word.format(url=url) for word in product.words]  # type: ignore[attr-defined]
        yield user
        user.close()


def log_in(user: User, provider: FakeOauth, product: Product, *, age_s: float = 0.0) -> None:
    """Store a login made some time ago, as `cloister login` does."""
    now = time.time() - age_s
    own = builtin_preset(product.name).login
    assert own
    login = provider.login(hosts=(HOST,), product=own.product, product_file=own.product_file, scopes=own.scopes)
    granted = read_token_answer(200, json.dumps(provider.grant() | {"scope": " ".join(own.scopes)}).encode(), now)
    kept = kept_logins.new("work", product.name, login, granted, now)
    kept = kept_logins.renewed(kept, granted, now, forced=False)
    with Shelf(str(user.state / "logins")).held("work") as held:
        held.write(kept_logins.encode(kept))


@pytest.mark.usefixtures("nothing_left")
def test_the_agent_works_with_a_login_it_does_not_hold(
    product: Product, user: User, provider: FakeOauth, workspace: Path, fake_model: FakeModel
) -> None:
    """It answers; the model got the real access token, renewed meanwhile; inside there is only the placeholder."""
    log_in(user, provider, product, age_s=3550)
    own = builtin_preset(product.name).login
    assert own
    fake_model.script = [Run(f"(cat ~/{own.product_file}; env) > seen"), Say("FINISHED")]

    done = user.run("run", product.name, *user.words, cwd=workspace, timeout_s=100)  # type: ignore[attr-defined]

    assert "FINISHED" in done.stdout, done.stderr
    real = {token for family in provider.families for token in (*family.access, family.refresh)}
    access = {token for family in provider.families for token in family.access}
    sent = {request.headers.get("authorization", "") for request in fake_model.requests if request.method == "POST"}
    sent.discard("")
    assert sent
    assert sent <= {f"Bearer {token}" for token in access}
    # Into a file, for a placeholder in the conversation would be one on its way to where it does not belong.
    seen = (workspace / "seen").read_text() + done.stdout + done.stderr
    assert "cloister-login-" in seen
    assert not [token for token in real if token in seen]
    assert provider.renewals() == 1  # the broker's
    user.close()
