"""`[login]` of a preset: addresses that tokens may go to, and redirects that stay on this machine."""

from __future__ import annotations

import pytest

from cloister.errors import PolicyError
from cloister.policy.load import load_preset
from cloister.policy.login_check import is_endpoint, is_redirect
from cloister.policy.presets import BUILTIN, builtin_preset

GOOD = {
    "token_url": '"https://as.example.org/token"',
    "authorize_url": '"https://as.example.org/authorize"',
    "client_id": '"c"',
    "hosts": '["api.example.org"]',
}


def preset(**changes: str) -> str:
    """Return a preset's text with some keys of `[login]` changed."""
    return "schema = 1\n[login]\n" + "".join(f"{key} = {value}\n" for key, value in (GOOD | changes).items())


def test_a_provider_nobody_heard_of_can_be_described():
    """A user's own preset with `[login]` is enough."""
    assert load_preset(preset(), "mine.toml").login is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"token_url": '"http://as.example.org/token"'},
        {"token_url": '"https://user:pass@as.example.org/token"'},
        {"token_url": '"https://as.example.org/token#x"'},
        {"token_url": '""'},
        {"token_url": '"file:///etc/passwd"'},
        {"revoke_url": '"ftp://as.example.org"'},
        {"authorize_url": '""'},
        {"redirect": '["https://evil.example/callback"]'},
        {"redirect": '["http://evil.example:80/callback"]'},
        {"redirect": '["http://127.0.0.1/callback"]'},
        {"redirect": '["http://127.0.0.1:{port}"]'},
        {"redirect": '["http://0.0.0.0:{port}/x"]'},
        {"hosts": "[]"},
        {"hosts": '["*.example.org"]'},
        {"hosts": '["10.0.0.0/8"]'},
        {"client_id": '"a b"'},
        {"scopes": '["a b"]'},
        {"authorize_parameters": '{ state = "mine" }'},
        {"authorize_parameters": '{ redirect_uri = "http://x" }'},
        {"headers": '{ "X:" = "y" }'},
        {"product": '"claude"'},
        {"product": '"claude"\nproduct_file = "../.ssh/id"'},
        {"client_secret": '"x"'},
    ],
)
def test_what_would_lose_a_token_is_a_mistake(changes):
    """Tokens go to https or this machine, codes come back to this machine, and no parameter of ours is replaced."""
    with pytest.raises(PolicyError):
        load_preset(preset(**changes), "mine.toml")


@pytest.mark.parametrize("name", [name for name in BUILTIN if builtin_preset(name).login])
def test_our_own_presets_keep_the_same_rules(name):
    """Facts of products are data, and the data is checked; the login file is one that is never carried in."""
    login = builtin_preset(name).login
    assert login
    assert is_endpoint(login.token_url)
    assert all(is_redirect(address) for address in login.redirect)
    assert login.product_file in builtin_preset(name).secrets


def test_claude_code_and_codex_can_be_logged_in_to():
    """The two products of the issue have their data."""
    assert {name for name in BUILTIN if builtin_preset(name).login} >= {"claude", "codex"}
