"""Heads of requests: what reaches an upstream, and what never does."""

from __future__ import annotations

import pytest

from cloister.llm import routes
from cloister.llm.upstreams import compile_upstream, key_field, own_lines, request_head
from cloister.policy.model import Provider

MESSAGES = routes.find("POST", b"/v1/messages")


def head(fields: list[tuple[bytes, bytes]], **provider) -> bytes:
    """Return the head that would be sent."""
    upstream = compile_upstream("p", Provider(**provider))
    field = key_field(upstream, "real-key")
    return request_head(upstream, "POST", "/v1/messages", fields, own_lines(upstream, [field]), 3)


def test_what_an_agent_says_is_passed_on_byte_for_byte():
    """FINDINGS 2.4 no. 4: betas, versions and unknown fields in their order, repeated ones too."""
    fields = [
        (b"anthropic-beta", b"a-1, b-2"), (b"Anthropic-Version", b"2023-06-01"), (b"X-Odd", b"  \xe9 "),
        (b"openai-organization", b"org"), (b"anthropic-beta", b"c"), (b"x-odd", b"2"),
    ]  # fmt: skip
    lines = head(fields).split(b"\r\n")
    assert [line for line in lines if line.lower().startswith((b"anthropic-", b"x-odd", b"openai-"))] == [
        b"%b: %b" % field for field in fields
    ]


@pytest.mark.parametrize("name", [
    "Authorization", "X-API-Key", "api-key", "Cookie", "Proxy-Authorization", "x-goog-api-key", "Connection", "TE",
    "Transfer-Encoding", "Content-Length", "Host", "Expect", "Forwarded", "X-Forwarded-For", "X-Amz-Security-Token",
    "Accept-Encoding", "X-Cloister-Anything",
])  # fmt: skip
def test_credentials_and_framing_of_the_agent_never_leave(name):
    """CF1: whatever a client presents stays here."""
    assert b"mine-alone" not in head([(name.encode(), b"mine-alone")])


def test_fields_that_connection_names_are_dropped():
    """RFC 9110, section 7.6.1; but a client cannot take the content type away by that."""
    sent = head([(b"Connection", b"x-hop, content-type"), (b"x-hop", b"1"), (b"content-type", b"application/json")])
    assert b"x-hop" not in sent
    assert b"application/json" in sent


@pytest.mark.parametrize(("provider", "key", "field"), [
    ({}, "sk-ant-api03-x", ("x-api-key", "sk-ant-api03-x")),
    ({}, "sk-ant-oat01-x", ("Authorization", "Bearer sk-ant-oat01-x")),
    ({"protocol": "openai"}, "sk-x", ("Authorization", "Bearer sk-x")),
    ({"auth": "bearer"}, "k", ("Authorization", "Bearer k")),
    ({"auth": "api-key"}, "k", ("api-key", "k")),
    ({"auth": "none"}, "", None),
    ({"auth": "sigv4", "region": "us-east-1"}, "k", None),
])  # fmt: skip
def test_the_key_goes_where_the_provider_takes_it(provider, key, field):
    """`auto` knows keys and logins of Anthropic apart."""
    assert key_field(compile_upstream("p", Provider(**provider)), key) == field


@pytest.mark.parametrize("key", ["a\r\nX: y", "a b", "k\u00e9y", "a\x00"])
def test_a_key_that_would_break_a_head_is_refused_without_its_text(key):
    """A key with a line break would be two fields; the message does not show it."""
    with pytest.raises(ValueError, match="the key holds") as caught:
        key_field(compile_upstream("p", Provider()), key)
    assert key not in str(caught.value)


def test_betas_that_an_upstream_refuses_are_taken_out():
    """Those alone: the value is untouched where it names none of them."""
    sent = head([(b"anthropic-beta", b"a,  b ,c")], deny_betas=("b",))
    assert b"anthropic-beta: a,c\r\n" in sent
    assert b"anthropic-beta: a,  x\r\n" in head([(b"anthropic-beta", b"a,  x")], deny_betas=("b",))
    assert b"anthropic-beta" not in head([(b"anthropic-beta", b"b")], deny_betas=("b",))


def test_a_providers_own_fields_win():
    """`anthropic-workspace-id` of the policy stands in place of the agent's."""
    sent = head([(b"Anthropic-Workspace-Id", b"agent")], headers={"anthropic-workspace-id": "owner"})
    assert b"agent" not in sent
    assert b"anthropic-workspace-id: owner\r\n" in sent


@pytest.mark.parametrize(("base", "path", "authority"), [
    ("", "/v1/messages", "api.anthropic.com"),
    ("https://x.example", "/v1/messages", "x.example"),
    ("https://x.example:8443/api/", "/api/v1/messages", "x.example:8443"),
    ("https://x.example/api/v1", "/api/v1/messages", "x.example"),
    ("http://127.0.0.1:9001", "/v1/messages", "127.0.0.1:9001"),
    ("http://[::1]:80", "/v1/messages", "[::1]"),
])  # fmt: skip
def test_addresses(base, path, authority):
    """The protocol's path comes behind the base; a version in the base is not said twice."""
    upstream = compile_upstream("p", Provider(base_url=base))
    assert (upstream.path(MESSAGES), upstream.authority) == (path, authority)


@pytest.mark.parametrize(("method", "target", "name"), [
    ("POST", b"/v1/messages?beta=true", "messages"),
    ("POST", b"/v1/messages/count_tokens", "count_tokens"),
    ("GET", b"/v1/models?limit=1000", "models"),
    ("HEAD", b"/", "probe"),
    ("POST", b"/v1/embeddings", "embeddings"),
    ("GET", b"/v1/messages", None),
    ("POST", b"/v1/messages/", None),
    ("POST", b"/v1//messages", None),
    ("POST", b"/v1/%6dessages", None),
    ("POST", b"/v1/messages/../models", None),
    ("POST", b"/v1/messages?a b", None),
    ("POST", b"/V1/messages", None),
    ("POST", b"/v1/files", None),
])  # fmt: skip
def test_routes_are_matched_by_path_alone(method, target, name):
    """FINDINGS 2.2: the query does not matter; another spelling of a path is another path."""
    route = routes.find(method, target)
    assert (route.name if route else None) == name


OAUTH = {"anthropic-beta": "oauth-2025-04-20"}


def login_head(fields: list[tuple[bytes, bytes]], login_headers: dict[str, str] | None = None, **provider) -> bytes:
    """Return the head that would be sent with a login."""
    headers = OAUTH if login_headers is None else login_headers
    upstream = compile_upstream("p", Provider(key="login:work", **provider), headers)
    own = own_lines(upstream, [key_field(upstream, "at-token")])
    return request_head(upstream, "POST", "/v1/messages", fields, own, 3)


@pytest.mark.parametrize(("fields", "expected"), [
    ([], [b"oauth-2025-04-20"]),
    ([(b"anthropic-beta", b"a-1, b-2")], [b"a-1, b-2,oauth-2025-04-20"]),
    ([(b"Anthropic-Beta", b"oauth-2025-04-20,a-1")], [b"oauth-2025-04-20,a-1"]),
    ([(b"anthropic-beta", b"a"), (b"anthropic-beta", b"b")], [b"a,oauth-2025-04-20", b"b"]),
])  # fmt: skip
def test_what_a_login_needs_is_added_to_what_the_agent_sends(fields, expected):
    """Beside the agent's betas and not in their place, and once; its token is a bearer, whatever that begins with."""
    lines = login_head(fields).split(b"\r\n")
    assert [line.partition(b": ")[2] for line in lines if line.lower().startswith(b"anthropic-beta")] == expected
    assert b"Authorization: Bearer at-token" in lines
    assert not [line for line in lines if line.lower().startswith(b"x-api-key")]


def test_a_login_and_the_policy_share_a_field():
    """Where the policy sets the list, the login's values join it; denied betas concern the agent's alone."""
    sent = login_head([(b"anthropic-beta", b"mine")], headers={"Anthropic-Beta": "house-1"})
    assert b"Anthropic-Beta: house-1,oauth-2025-04-20\r\n" in sent
    assert b"mine" not in sent
    denied = login_head([(b"anthropic-beta", b"mine, other")], deny_betas=("mine", "oauth-2025-04-20"))
    assert b"other,oauth-2025-04-20" in denied
    other = login_head([(b"x-login", b"agent's")], {"X-Login": "login's"})
    assert b"X-Login: login's\r\n" in other
    assert b"agent's" not in other
