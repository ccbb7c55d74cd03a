"""Login files of products: taken over as they are, and written so that products find a login and never renew it."""

from __future__ import annotations

import json

import pytest

from cloister.credentials.oauth_answers import AnswerError, claims
from cloister.credentials.products import FAR, placeholder_file, read_product

NOW = 1_800_000_000.0
TOKEN = "cloister-claude-abcdefgh234567"
DETAILS = {"chatgpt_account_id": "acc-1", "chatgpt_plan_type": "pro", "subscriptionType": "max"}


@pytest.mark.parametrize("product", ["claude", "codex"])
def test_what_is_written_reads_as_a_login_that_lasts(product):
    """Our own reader takes the placeholders for a login whose end is decades away."""
    text = placeholder_file(product, TOKEN, DETAILS, ("user:inference",))

    found = read_product(product, text.encode(), NOW)

    assert TOKEN in found.access_token
    assert found.refresh_token == TOKEN
    assert found.lifetime_s
    assert found.lifetime_s > 50 * 365 * 86400


def test_codex_finds_its_account_in_tokens_that_parse():
    """ID token and access token are JWTs by their shape; the placeholder is the signature, so it is recognised."""
    tokens = json.loads(placeholder_file("codex", TOKEN, DETAILS, ()))["tokens"]

    for name in ("id_token", "access_token"):
        assert claims(tokens[name])["https://api.openai.com/auth"] == {
            "chatgpt_account_id": "acc-1",
            "chatgpt_plan_type": "pro",
        }
        assert claims(tokens[name])["exp"] == FAR
        assert tokens[name].endswith(f".{TOKEN}")
    assert tokens["account_id"] == "acc-1"


def test_claude_code_finds_scopes_and_plan():
    """Without the scopes it would not take the login for one."""
    own = json.loads(placeholder_file("claude", TOKEN, DETAILS, ("user:inference", "user:profile")))["claudeAiOauth"]

    assert own["scopes"] == ["user:inference", "user:profile"]
    assert own["subscriptionType"] == "max"
    assert own["expiresAt"] == FAR * 1000


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"{", b"[" * 100_000, b'{"claudeAiOauth": 1, "tokens": []}',
     b'{"claudeAiOauth": {"accessToken": "a"}, "tokens": {"access_token": "a"}}',
     b'{"claudeAiOauth": {"accessToken": 1, "refreshToken": "r"}, "tokens": {"access_token": 1, "refresh_token": "r"}}',
     b'{"claudeAiOauth": {"accessToken": "a\\nb", "refreshToken": "r"}, "tokens": {"access_token": ""}}'],
)  # fmt: skip
@pytest.mark.parametrize("product", ["claude", "codex"])
def test_files_without_a_login_are_refused(product, data):
    """Nothing is taken over that could not be renewed or sent, and nothing of the file is in the error."""
    with pytest.raises(AnswerError) as caught:
        read_product(product, data, NOW)

    assert caught.value.code in ("product-file-unreadable", "product-not-logged-in")


def test_a_login_that_has_run_out_is_taken_over_and_due():
    """Products renew late: the file often holds an access token that has ended."""
    data = {"claudeAiOauth": {"accessToken": "a", "refreshToken": "r", "expiresAt": 1000}}

    found = read_product("claude", json.dumps(data).encode(), NOW)

    assert found.lifetime_s
    assert found.lifetime_s < 1
