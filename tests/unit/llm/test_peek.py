"""What a request asks for is read from its bytes, and small changes leave the rest alone."""

from __future__ import annotations

import json

import pytest

from cloister.llm import routes
from cloister.llm.access import Access
from cloister.llm.errors import Refusal
from cloister.llm.order import read_order
from cloister.llm.peek import BodyError, peek, put, put_usage, splice
from cloister.policy.model import Llm

MESSAGES = routes.find("POST", b"/v1/messages")
CHAT = routes.find("POST", b"/v1/chat/completions")
RESPONSES = routes.find("POST", b"/v1/responses")


def reason(body: bytes, route: routes.Route = MESSAGES) -> str:
    """Return why a body is refused."""
    with pytest.raises(BodyError) as caught:
        peek(body, route)
    return caught.value.reason


def test_values_are_found_wherever_they_stand():
    """Odd white space, escapes in keys and values, and look-alikes in nested objects and strings change nothing."""
    body = (
        b'\r\n {"messages":[{"model":"no","content":"\\"model\\":\\"no\\", \\"stream\\": true"}],\t"mod\\u0065l" : '
        b'"claude-\\u0078" ,\n"tools":[{"stream":true,"max_tokens":9}], "stream" :false,"max_tokens"\n:\n77 } \n'
    )
    found = peek(body, MESSAGES)
    assert (found.model, found.stream, found.output_limit) == ("claude-x", False, 77)


@pytest.mark.parametrize("body", [
    b'{"model":"a","model":"b"}',
    b'{"model":"a","model":"a"}',
    b'{"model":"a","x":{},"mod\\u0065l":"b"}',
    b'{"model":"a","Model":"b"}',
    b'{"model":"a","MAX_TOKENS":1}',
    '{"model":"a","\u017ftream":true}'.encode(),
    b'{"model":"a","x":1,"x":1}',
])  # fmt: skip
def test_what_two_readers_could_read_differently_is_refused(body):
    """A key twice, in any spelling, or one that differs from ours in case only, as Go's reader would take it."""
    assert reason(body) == "body-ambiguous"


@pytest.mark.parametrize("body", [
    b"", b"[]", b'"x"', b"{", b'{"model":"a"}x', b'{"model":"a",}', b'{"model":NaN}', b'{"model":7}',
    b'{"model":"a","stream":"yes"}', b'{"model":"a","max_tokens":1.5}', b'{"model":"a","max_tokens":-1}',
    b'{"model":"a","x":"\xff"}', b'{"model":"a","x":"\xc0\xa2"}', b"[" * 100_000, b'{"model":' + b"[" * 100_000,
    b'\xef\xbb\xbf{"model":"a"}',
])  # fmt: skip
def test_what_is_no_request_is_refused(body):
    """Broken JSON, wrong types, bytes that are not UTF-8 and bottomless nesting end in one refusal."""
    assert reason(body) == "body-invalid"


def test_a_request_without_a_model_is_refused():
    """No model, or none that is a name: nothing could be checked against the policy."""
    assert reason(b'{"messages":[]}') == "model-missing"
    assert reason(b'{"model":null}') == "model-missing"


def test_work_in_the_background_is_refused():
    """Its usage would come with a later request that this proxy does not serve."""
    assert reason(b'{"model":"a","background":true}', RESPONSES) == "feature-unmetered"
    assert peek(b'{"model":"a","background":false}', RESPONSES).model == "a"


def test_changes_touch_nothing_else():
    """A replaced value and an added one; every other byte stays, with its odd spacing."""
    body = b'{ "model" : "a" ,  "messages":[1,  2] }'
    found = peek(body, MESSAGES)
    changed = splice(body, [put(found, "model", b'"bb"'), put(found, "max_tokens", b"5")])
    assert changed == b'{"max_tokens":5, "model" : "bb" ,  "messages":[1,  2] }'


@pytest.mark.parametrize(("before", "after"), [
    (b'{"model":"a"}', {"include_usage": True}),
    (b'{"model":"a","stream_options":null}', {"include_usage": True}),
    (b'{"model":"a","stream_options":{}}', {"include_usage": True}),
    (b'{"model":"a","stream_options":{"include_usage":false}}', {"include_usage": True}),
    (b'{"model":"a","stream_options":{"x":1}}', {"include_usage": True, "x": 1}),
])  # fmt: skip
def test_usage_is_asked_for_whatever_stands_there(before, after):
    """The options of a stream get `include_usage`, and keep what else they have."""
    changed = splice(before, [put_usage(before, peek(before, CHAT))])
    assert json.loads(changed)["stream_options"] == after


def order(body: dict, route: routes.Route = MESSAGES, cap: int | None = None, host: str = "", **llm):
    """Return what would be sent."""
    return read_order(json.dumps(body).encode(), route, Access(Llm(**llm)), cap, host)


def test_an_alias_is_sent_as_the_model_it_stands_for():
    """The agent's word is replaced in place; the model behind an alias needs no other permission."""
    found = order({"model": "fast", "messages": []}, aliases={"fast": "claude-haiku"}, models=("claude-opus",))
    assert json.loads(found.body)["model"] == "claude-haiku"


def test_models_outside_the_list_are_refused():
    """By pattern; also those that OpenRouter would take instead."""
    assert order({"model": "gpt-9"}, models=("claude-*",)).reason == "model-not-allowed"
    assert order({"model": "claude-x"}, models=("claude-*",)).model == "claude-x"
    both = {"model": "claude-x", "models": ["claude-x", "gpt-9"]}
    assert order(both, CHAT, models=("claude-*",)).reason == "model-not-allowed"


@pytest.mark.parametrize(("route", "host", "given", "sent"), [
    (MESSAGES, "", {"max_tokens": 99}, {"max_tokens": 10}),
    (MESSAGES, "", {"max_tokens": 5}, {"max_tokens": 5}),
    (MESSAGES, "", {}, {"max_tokens": 10}),
    (MESSAGES, "", {"max_tokens": None}, {"max_tokens": 10}),
    (CHAT, "", {}, {"max_tokens": 10}),
    (CHAT, "api.openai.com", {}, {"max_completion_tokens": 10}),
    (CHAT, "", {"max_tokens": 99, "max_completion_tokens": 50}, {"max_tokens": 10, "max_completion_tokens": 10}),
    (RESPONSES, "", {}, {"max_output_tokens": 10}),
])  # fmt: skip
def test_the_output_is_bounded(route, host, given, sent):
    """Every bound is brought down to the policy's; where there is none, one is put in under the name the host takes."""
    found = order({"model": "a", **given}, route, 10, host)
    body = json.loads(found.body)
    assert {key: value for key, value in body.items() if "max" in key} == sent
    assert found.demand.output_tokens <= 10


def test_several_answers_reserve_several_outputs():
    """`n` multiplies what may come back."""
    assert order({"model": "a", "max_tokens": 7, "n": 3}, CHAT).demand.output_tokens == 21


def test_marks_for_the_cache_reserve_the_price_of_writing_to_it():
    """Twice the price for an hour, 1.25 times for five minutes: the reservation is in that kind of token."""
    short = {"model": "a", "messages": [{"cache_control": {"type": "ephemeral"}}]}
    long = {"model": "a", "messages": [{"cache_control": {"type": "ephemeral", "ttl": "1h"}}]}
    assert order(short).demand.cache_write_5m_tokens > 0
    assert order(long).demand.cache_write_1h_tokens > 0


def test_pictures_are_not_counted_by_their_bytes():
    """A megabyte of base64 is some thousand tokens; a megabyte of text is some hundred thousand."""
    data = "A" * 1_000_000
    picture = {"model": "a", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    assert order(picture).demand.total < 50_000
    assert order({"model": "a", "text": data}).demand.input_tokens > 400_000


def test_refusals_say_what_is_allowed():
    """A person can tell from the answer what to write."""
    refused = order({"model": "x"}, models=("claude-*",), aliases={"fast": "m"})
    assert isinstance(refused, Refusal)
    assert "claude-*" in refused.message
    assert "fast" in refused.message
