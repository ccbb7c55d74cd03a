"""The OAuth protocol as values: what is opened and sent, and which redirects and answers count."""

from __future__ import annotations

import base64
import json
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from cloister.credentials import oauth
from cloister.credentials.oauth_answers import (
    AnswerError,
    read_device_answer,
    read_revoke_answer,
    read_token_answer,
)
from cloister.policy.login import Login
from cloister.policy.presets import builtin_preset

NOW = 1_800_000_000.0
LOGIN = Login(
    authorize_url="https://as.example.org/authorize?tenant=1",
    token_url="https://as.example.org/token",
    client_id="client",
    scopes=("read", "write"),
    hosts=("api.example.org",),
)
ATTEMPT = oauth.begin(bytes(range(64)))
REDIRECT = "http://127.0.0.1:4711/callback"


def answer(**fields: object) -> bytes:
    """Return a token answer with some fields changed."""
    return json.dumps({"access_token": "at", "token_type": "Bearer", "expires_in": 60} | fields).encode()


def jwt(payload: dict[str, object]) -> str:
    """Return something of a JWT's shape."""
    middle = base64.urlsafe_b64encode(json.dumps(payload).encode()).rstrip(b"=").decode()
    return f"e30.{middle}.c2ln"


def test_the_challenge_is_that_of_the_rfc():
    """RFC 7636 appendix B."""
    assert (
        oauth.challenge("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk") == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
    )


def test_an_attempt_is_made_of_chance_alone():
    """Verifier and state have 256 bits each and share none; they never show."""
    other = oauth.begin(bytes(64))

    assert len(ATTEMPT.verifier) == len(ATTEMPT.state) == 43
    assert ATTEMPT.verifier != ATTEMPT.state
    assert other.state != ATTEMPT.state
    assert ATTEMPT.verifier not in repr(ATTEMPT)
    assert ATTEMPT.state not in repr(ATTEMPT)
    with pytest.raises(ValueError, match="64"):
        oauth.begin(b"short")


def test_the_address_asks_for_a_code_with_s256_and_state():
    """The verifier itself stays here; what the provider's address holds already is kept."""
    address = oauth.authorize_url(LOGIN, ATTEMPT, REDIRECT)

    asked = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
    assert asked == {
        "tenant": "1",
        "response_type": "code",
        "client_id": "client",
        "redirect_uri": REDIRECT,
        "scope": "read write",
        "state": ATTEMPT.state,
        "code_challenge": oauth.challenge(ATTEMPT.verifier),
        "code_challenge_method": "S256",
    }
    assert ATTEMPT.verifier not in address


@pytest.mark.parametrize(
    "query",
    [
        "",
        "code=stolen",
        "code=stolen&state=",
        "code=stolen&state=wrong",
        f"code=stolen&state={ATTEMPT.state}x",
        f"code=a&code=b&state={ATTEMPT.state}",
        f"state=wrong&state={ATTEMPT.state}&code=a",
        "error=access_denied",
        f"error=access_denied&state={ATTEMPT.state[:-1]}",
        "&".join(f"a{n}=1" for n in range(200)) + f"&code=a&state={ATTEMPT.state}",
        "%00=%ff;;&&state=\u00e4",
    ],
)
def test_a_redirect_of_somebody_else_is_none(query):
    """Another page can make the browser ask our listener: without this attempt's state it neither helps nor harms."""
    with pytest.raises(oauth.WrongStateError):
        oauth.read_callback(query, ATTEMPT)


def test_the_right_redirect_gives_the_code():
    """The twin: state of this attempt, one code."""
    assert oauth.read_callback(urlencode({"code": "c/1", "state": ATTEMPT.state}), ATTEMPT) == "c/1"


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"error": "access_denied"}, "access_denied"),
        ({"error": "<script>"}, "error-unreadable"),
        ({}, "code-missing"),
        ({"code": ""}, "code-missing"),
        ({"code": "a b"}, "code-missing"),
        ({"code": "x" * 20000}, "code-missing"),
    ],
)
def test_a_refusal_is_told_by_its_code(query, code):
    """Only what looks like an error code is shown of it."""
    with pytest.raises(AnswerError) as caught:
        oauth.read_callback(urlencode(query | {"state": ATTEMPT.state}), ATTEMPT)

    assert caught.value.code == code


def test_what_is_pasted_needs_the_state_too():
    """The last page's address or its `CODE#STATE` are taken; a bare code could be anybody's and is not."""
    assert oauth.read_pasted(f"  c1#{ATTEMPT.state}\n", ATTEMPT) == "c1"
    assert oauth.read_pasted(f"{REDIRECT}?code=c2&state={ATTEMPT.state}", ATTEMPT) == "c2"
    for text in ("c1", "c1#", "#", "", f"c1#{ATTEMPT.state}#", f"{REDIRECT}?code=c2&state=other", "http://[::1"):
        with pytest.raises((oauth.WrongStateError, AnswerError, ValueError)):
            oauth.read_pasted(text, ATTEMPT)


def test_requests_have_the_forms_that_providers_want():
    """The code as form or JSON, with `state` and `scope` where a provider wants them; bodies never show."""
    claude = builtin_preset("claude").login
    codex = builtin_preset("codex").login
    assert claude
    assert codex

    code = oauth.exchange_request(claude, ATTEMPT, REDIRECT, "c1")
    renewal = oauth.refresh_request(claude, "rt1", ("a", "b"))
    form = oauth.exchange_request(codex, ATTEMPT, REDIRECT, "c1")

    assert json.loads(code.body) == {
        "grant_type": "authorization_code",
        "code": "c1",
        "redirect_uri": REDIRECT,
        "client_id": claude.client_id,
        "code_verifier": ATTEMPT.verifier,
        "state": ATTEMPT.state,
    }
    assert json.loads(renewal.body) == {
        "grant_type": "refresh_token",
        "refresh_token": "rt1",
        "client_id": claude.client_id,
        "scope": "a b",
    }
    assert form.content_type == "application/x-www-form-urlencoded"
    assert "state" not in parse_qs(form.body.decode())
    assert "scope" not in json.loads(oauth.refresh_request(codex, "rt1", ("a",)).body)
    assert "rt1" not in repr(renewal)


def test_tokens_are_read():
    """The ordinary answer, and what shows of it."""
    found = read_token_answer(200, answer(refresh_token="rt", scope="read write"), NOW)

    assert (found.access_token, found.refresh_token, found.lifetime_s) == ("at", "rt", 60.0)
    assert found.scopes == ("read", "write")
    assert "rt" not in repr(found)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (answer(access_token=""), "access-token-missing"),
        (answer(access_token=None), "access-token-missing"),
        (answer(access_token=7), "access-token-unusable"),
        (answer(access_token="a\r\nX: y"), "access-token-unusable"),
        (answer(access_token="a b"), "access-token-unusable"),
        (answer(access_token="\u00e4"), "access-token-unusable"),
        (answer(access_token="a" * 20000), "access-token-unusable"),
        (answer(refresh_token="a\nb"), "refresh-token-unusable"),
        (answer(token_type="mac"), "token-type-unknown"),
        (answer(token_type=["Bearer"]), "token-type-unknown"),
        (answer(token_type="DPoP"), "token-type-unknown"),
        (b"{}", "access-token-missing"),
        (b"[1]", "not-json"),
        (b"<html>", "not-json"),
        (b"", "not-json"),
        (b"\xff\xfe", "not-json"),
        (b"[" * 100_000, "not-json"),
    ],
)
def test_unusable_answers_are_refused(body, code):
    """A token that could end a header, is of another type or is missing is no token."""
    with pytest.raises(AnswerError) as caught:
        read_token_answer(200, body, NOW)

    assert caught.value.code == code


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {"error": "invalid_grant", "error_description": "rt-secret"}, "ended"),
        (401, {"error": {"code": "refresh_token_reused", "message": "rt-secret"}}, "ended"),
        (401, {"error": {"type": "invalid_grant"}}, "ended"),
        (401, {"error": {"code": "refresh_token_expired"}}, "ended"),
        (503, {"error": "invalid_grant"}, "later"),
        (400, {"error": "authorization_pending"}, "pending"),
        (400, {"error": "slow_down"}, "slow-down"),
        (400, {"error": "invalid_client"}, "refused"),
        (400, {"error": "rt-0a1b2c3d4e5f"}, "refused"),
        (403, {"x": 1}, "refused"),
        (404, [], "refused"),
        (302, {}, "refused"),
        (429, {"error": "rate_limit_error"}, "later"),
        (500, {}, "later"),
        (200, {"error": "invalid_grant"}, "ended"),
    ],
)
def test_errors_mean_what_they_do_to_a_login(status, body, kind):
    """Only definite words of the provider end a login; trouble of a server passes. Nothing that was sent is quoted."""
    with pytest.raises(AnswerError) as caught:
        read_token_answer(status, json.dumps(body).encode(), NOW, retry_after_s=7)

    assert caught.value.kind == kind
    assert "rt-" not in str(caught.value)
    assert caught.value.retry_after_s == (7 if kind in ("later", "pending", "slow-down") else 0)


@pytest.mark.parametrize(
    ("given", "lifetime"),
    [(60, 60.0), ("60", 60.0), (1.5, 1.5), (0, None), (-1, None), (True, None), ("1e9", None), (None, None),
     ([], None), (10**30, 10 * 365 * 86400.0), ("9" * 400, None)],
)  # fmt: skip
def test_lifetimes_are_bounded(given, lifetime):
    """Numbers, also as text; nothing absurd, negative or truthy."""
    assert read_token_answer(200, answer(expires_in=given), NOW).lifetime_s == lifetime


def test_an_access_token_that_is_a_jwt_tells_its_own_end():
    """Codex's provider may leave `expires_in` out."""
    body = answer(expires_in=None, access_token=jwt({"exp": int(NOW) + 900}))

    assert read_token_answer(200, body, NOW).lifetime_s == 900
    assert read_token_answer(200, answer(expires_in=None, access_token=jwt({"exp": True})), NOW).lifetime_s is None


def test_whose_login_it_is_comes_from_the_id_token_or_the_account():
    """An ID token's email and OpenAI's account, or Anthropic's `account`; control characters are not shown."""
    own = {"chatgpt_account_id": "acc", "chatgpt_plan_type": "pro", "secret": "x"}
    with_token = answer(id_token=jwt({"email": "a@example.org", "https://api.openai.com/auth": own}))
    with_account = answer(account={"email_address": "b@example.org"})

    found = read_token_answer(200, with_token, NOW)
    assert found.account == "a@example.org"
    assert found.details == {"chatgpt_account_id": "acc", "chatgpt_plan_type": "pro"}
    assert read_token_answer(200, with_account, NOW).account == "b@example.org"
    assert read_token_answer(200, answer(id_token=jwt({"email": "a\x1b[2J"})), NOW).account == ""
    assert read_token_answer(200, answer(id_token="a.b.c"), NOW).account == ""


def test_device_codes_are_read_and_bounded():
    """RFC 8628 section 3.2: the interval is 5 s when left out; addresses that are no web pages are refused."""
    good = {"device_code": "dc", "user_code": "WDJB", "verification_uri": "https://as.example.org/d", "expires_in": 900}

    found = read_device_answer(200, json.dumps(good).encode())
    assert (found.user_code, found.interval_s, found.lifetime_s) == ("WDJB", 5.0, 900.0)
    assert "dc" not in repr(found).replace("device_code", "")
    for change in ({"user_code": "a\x1b[2J"}, {"verification_uri": "file:///etc/passwd"}, {"device_code": ""},
                   {"expires_in": None}, {"verification_uri": 5}):  # fmt: skip
        with pytest.raises(AnswerError):
            read_device_answer(200, json.dumps(good | change).encode())


def test_revocation_is_done_or_told():
    """RFC 7009 section 2.2: 200 with any body; an error is one."""
    read_revoke_answer(200, b"")
    with pytest.raises(AnswerError):
        read_revoke_answer(503, b"")
