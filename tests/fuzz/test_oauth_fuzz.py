"""What providers and browsers send is hostile: any bytes give a value or one of two errors, and never quote."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from cloister.credentials import logins, oauth
from cloister.credentials.oauth_answers import (
    AnswerError,
    Granted,
    read_device_answer,
    read_revoke_answer,
    read_token_answer,
)
from cloister.credentials.products import read_product
from cloister.policy.login import Login

ATTEMPT = oauth.begin(bytes(range(64)))
LOGIN = Login(authorize_url="https://a.example/a", token_url="https://a.example/t", client_id="c", hosts=("a.example",))
SECRET = "ort01-Zq7secret"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20) | st.just(SECRET),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("access_token", "refresh_token", "token_type", "expires_in", "scope", "error", "error_description", "id_token",
        "account", "code", "device_code", "user_code", "verification_uri", "interval",
        "claudeAiOauth", "tokens", "accessToken", "expiresAt")  # fmt: skip
OBJECTS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8)


@given(st.integers(100, 599), st.binary(max_size=200) | OBJECTS.map(lambda found: json.dumps(found).encode()))
def test_any_answer_is_a_value_or_an_error(status, body):
    """Token, device, revocation and product files alike; errors hold nothing of what was sent."""
    for read in (
        lambda: read_token_answer(status, body, 1.8e9),
        lambda: read_device_answer(status, body),
        lambda: read_revoke_answer(status, body),
        lambda: read_product("claude", body, 1.8e9),
        lambda: read_product("codex", body, 1.8e9),
    ):
        try:
            found = read()
        except AnswerError as error:
            found = str(error)
        if isinstance(found, str):
            assert SECRET not in found
            assert found.isprintable()
        if isinstance(found, Granted):
            assert found.access_token.isascii()
            assert found.access_token.isprintable()
            assert " " not in found.access_token
            assert found.lifetime_s is None or 0 < found.lifetime_s < 1e12
            assert found.access_token not in repr(found) or len(found.access_token) < 8


@given(st.text(max_size=200))
def test_no_text_is_taken_for_our_redirect(text):
    """Without the state of this attempt nothing gives a code."""
    for read in (oauth.read_callback, oauth.read_pasted):
        try:
            code = read(text, ATTEMPT)
        except (oauth.WrongStateError, AnswerError, ValueError):
            continue
        assert code is None, "only chance could have found the state"


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=60))
def test_every_code_comes_through_a_redirect_unchanged(code):
    """Whatever characters a provider's codes have, also `&`, `#`, `%` and `+`."""
    from urllib.parse import urlencode

    assert oauth.read_callback(urlencode({"code": code, "state": ATTEMPT.state}), ATTEMPT) == code


@given(
    st.one_of(st.none(), st.floats(0.001, 1e8)),
    st.lists(st.tuples(st.sampled_from(["begun", "renewed", "ended"]), st.floats(-1e6, 1e6)), max_size=6),
    st.floats(0, 1),
)
def test_judging_never_fails_and_an_ended_login_stays_ended(lifetime, steps, jitter):
    """Any history and any clock: one of four words; nothing but a new login revives what has ended."""
    granted = Granted("a", "r", lifetime, (), "", {})
    kept = logins.new("n", "p", LOGIN, granted, 1.8e9)
    over = False
    for what, offset in steps:
        now = 1.8e9 + offset
        if over:
            break
        if what == "begun":
            kept = logins.begun(kept, now)
        elif what == "renewed":
            kept = logins.renewed(kept, granted, now, forced=False)
        else:
            kept, over = logins.ended(kept, "invalid_grant"), True
        state = logins.judge(kept, now, jitter)
        assert state in ("good", "due", "expired", "ended")
        assert (state == "ended") == over
        assert logins.decode(logins.encode(kept)) == kept
