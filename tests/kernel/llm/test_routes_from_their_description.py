"""The routes attacked from their OpenAPI description: whatever is sent, the answer is one a client understands."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis

from support.inference import KEYS, Scripted, answer, proxied

pytestmark = pytest.mark.kernel

NAMES = {"anyOf": [{"enum": ["claude-sonnet-4-5", "gpt-5"]}, {"type": "string", "maxLength": 60}]}
COUNT = {"type": "integer", "minimum": 1, "maximum": 100_000}
MESSAGES = {
    "type": "array",
    "maxItems": 4,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["user", "assistant"]}, "content": {"type": ["string", "array", "null"]}},
    },
}


def operation(required: list[str], **properties: Any) -> dict[str, Any]:
    """Return a POST of JSON; further keys are allowed, since providers add some every month."""
    body = {"type": "object", "required": required, "properties": {"model": NAMES, **properties}}
    return {
        "post": {
            "parameters": [{"name": "beta", "in": "query", "schema": {"type": "boolean"}}],
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {"default": {"description": "an answer of the provider, or an error in its shape"}},
        }
    }


def listing() -> dict[str, Any]:
    """Return a GET without a body."""
    parameter = {"name": "limit", "in": "query", "schema": {"type": "integer"}}
    return {"get": {"parameters": [parameter], "responses": {"default": {"description": "models"}}}}


STREAM = {"stream": {"type": "boolean"}}
DESCRIPTION = {
    "openapi": "3.1.0",
    "info": {"title": "The inference proxy", "version": "1"},
    "paths": {
        "/v1/messages": operation(["model", "max_tokens", "messages"], max_tokens=COUNT, messages=MESSAGES, **STREAM),
        "/v1/messages/count_tokens": operation(["model", "messages"], messages=MESSAGES),
        "/v1/chat/completions": operation(["model", "messages"], messages=MESSAGES, n=COUNT, **STREAM),
        "/v1/responses": operation(["model", "input"], input={"type": ["string", "array"]}, **STREAM),
        "/v1/embeddings": operation(["model", "input"], input={"type": ["string", "array"]}),
        "/v1/models": listing(),
        "/healthz": listing(),
        "/metrics": listing(),
    },
}
SCHEMA = schemathesis.openapi.from_dict(DESCRIPTION)
BUDGET = hypothesis.settings(max_examples=40, deadline=None, database=None, derandomize=True)
QUIET = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A proxy in front of a sound upstream."""
    with proxied(tmp_path_factory.mktemp("routes") / "proxy", answer) as (proxy, upstream):
        yield proxy, upstream
        assert "Traceback" not in proxy.log, proxy.log[-3000:]
        proxy.end()
        assert len(upstream.requests) > 20, "hardly a request was right, so nothing was tried"
        rows = proxy.dispatched()
        assert len(rows) == len({row["id"] for row in rows}) == len(upstream.requests)


@SCHEMA.parametrize()
@hypothesis.settings(BUDGET, suppress_health_check=QUIET)
def test_every_answer_is_one_a_client_understands(case, served):
    """No request, right or wrong, gets a 500, a hang or a text that is no JSON; refusals carry their reason."""
    proxy, upstream = served
    check(case, proxy, upstream, {"Authorization": f"Bearer {KEYS['agent']}"})


@SCHEMA.parametrize()
@hypothesis.settings(BUDGET, suppress_health_check=QUIET, max_examples=10)
def test_without_a_key_no_route_leads_anywhere(case, served):
    """The same requests without a key, or with a wrong one, reach no upstream."""
    proxy, upstream = served
    before = len(upstream.requests)
    check(case, proxy, upstream, {"x-api-key": "made-up-virtual-key-3"})
    assert len(upstream.requests) == before


def check(case: Any, proxy: Any, upstream: Scripted, headers: dict[str, str]) -> None:
    """Send a case and judge the answer."""
    try:
        response = case.call(base_url=f"http://127.0.0.1:{proxy.port}", headers=headers, timeout=10)
    except (requests.exceptions.InvalidHeader, UnicodeError):
        return  # what the client library refuses to send
    assert response.status_code < 500 or response.status_code in {502, 503}, response.text
    kind = response.headers.get("content-type", [""])[0]
    if "json" in kind:
        json.loads(response.content)
    elif response.content:
        assert kind.startswith(("text/event-stream", "text/plain")), kind
    if response.status_code >= 400:
        assert response.headers.get("x-cloister-reason"), (response.status_code, response.text)
    assert b"made-up-key-of-the-owner" not in response.content
    assert upstream.requests is not None
