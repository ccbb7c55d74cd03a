"""Usage is read from every kind of answer, in disjoint kinds of tokens."""

from __future__ import annotations

import json

import pytest

from cloister.llm.tokens import Usage
from cloister.llm.usage import Meter


def events(*data: object, end: bytes = b"\n\n") -> bytes:
    """Return server-sent events."""
    lines = (one if isinstance(one, str) else json.dumps(one) for one in data)
    return b"".join(b"data: " + line.encode() + end for line in lines)


def metered(shape: str, body: bytes, *, stream: bool):
    """Return the meter and its result."""
    meter = Meter(shape, stream=stream)
    meter.feed(body)
    return meter, meter.finish()


ANTHROPIC = {
    "input_tokens": 10, "output_tokens": 20, "cache_read_input_tokens": 300, "cache_creation_input_tokens": 70,
    "cache_creation": {"ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 40},
}  # fmt: skip
ANTHROPIC_USAGE = Usage(
    input_tokens=10, cache_read_tokens=300, cache_write_5m_tokens=30, cache_write_1h_tokens=40, output_tokens=20
)
OPENAI = {
    "prompt_tokens": 100, "completion_tokens": 30, "prompt_tokens_details": {"cached_tokens": 60},
    "completion_tokens_details": {"reasoning_tokens": 25},
}  # fmt: skip
OPENAI_USAGE = Usage(input_tokens=40, cache_read_tokens=60, output_tokens=30, reasoning_tokens=25)
RESPONSES = {
    "input_tokens": 100, "output_tokens": 30, "input_tokens_details": {"cached_tokens": 60},
    "output_tokens_details": {"reasoning_tokens": 25},
}  # fmt: skip


@pytest.mark.parametrize(("shape", "answer", "usage"), [
    ("anthropic", {"usage": ANTHROPIC}, ANTHROPIC_USAGE),
    ("chat", {"usage": OPENAI}, OPENAI_USAGE),
    ("responses", {"usage": RESPONSES}, OPENAI_USAGE),
    ("chat", {"usage": {"prompt_tokens": 5, "total_tokens": 5}}, Usage(input_tokens=5)),
    ("chat", {"usage": {"prompt_tokens": 0, "completion_tokens": 0}}, Usage()),
    ("chat", {"usage": {"prompt_tokens": 4, "completion_tokens": 2, "cost": 0.25}},
     Usage(input_tokens=4, output_tokens=2, cost_usd=0.25)),
    ("chat", {"timings": {"prompt_n": 6, "predicted_n": 3, "cache_n": 2}},
     Usage(input_tokens=6, cache_read_tokens=2, output_tokens=3)),
])  # fmt: skip
def test_whole_answers(shape, answer, usage):
    """Anthropic's input excludes cached tokens, OpenAI's includes them; an explicit 0 is a number; costs are kept."""
    meter, result = metered(shape, json.dumps({**answer, "model": "m-1"}).encode(), stream=False)
    assert result == (usage, "provider", "m-1")
    assert meter.final


def test_a_stream_of_messages():
    """Input from its start, cumulative output from its end; 5-minute and 1-hour writes to the cache stay apart."""
    body = events(
        {"type": "message_start", "message": {"model": "claude-x", "usage": {**ANTHROPIC, "output_tokens": 1}}},
        {"type": "message_delta", "usage": {"output_tokens": 7}},
        {"type": "message_delta", "usage": {"output_tokens": 20}},
        {"type": "message_stop"},
    )
    meter, result = metered("anthropic", body, stream=True)
    assert result == (ANTHROPIC_USAGE, "provider", "claude-x")
    assert meter.finished


def test_a_last_word_of_zero_counts():
    """LiteLLM #37992: an explicit 0 was read as missing."""
    body = events({"message": {"usage": {"input_tokens": 9, "output_tokens": 4}}}, {"usage": {"output_tokens": 0}})
    assert metered("anthropic", body, stream=True)[1].usage == Usage(input_tokens=9)


@pytest.mark.parametrize("extra", [
    ({"choices": [{}], "usage": OPENAI}, "[DONE]"),  # llama.cpp: with the last choice
    ({"choices": [{}], "usage": None}, {"choices": [], "usage": OPENAI}, "[DONE]"),  # OpenAI: a chunk of its own
])  # fmt: skip
def test_a_stream_of_chat_completions(extra):
    """In the last choice's chunk or in one of its own."""
    meter, result = metered("chat", events({"choices": [{}], "model": "g"}, *extra), stream=True)
    assert (result.usage, result.source) == (OPENAI_USAGE, "provider")
    assert meter.finished


def test_a_stream_of_responses():
    """Usage comes with `response.completed`."""
    done = {"type": "response.completed", "response": {"model": "gpt-x", "usage": RESPONSES}}
    meter, result = metered("responses", events({"type": "response.created", "response": {}}, done), stream=True)
    assert result == (OPENAI_USAGE, "provider", "gpt-x")
    assert meter.finished


def test_a_broken_stream_is_estimated():
    """The input that was told is kept, the output is guessed from what arrived, and the result says so."""
    start = {"message": {"model": "m", "usage": {"input_tokens": 50, "output_tokens": 1}}}
    deltas = [{"type": "content_block_delta", "delta": {"text": "word " * 30}} for _ in range(10)]
    meter, result = metered("anthropic", events(start, *deltas), stream=True)
    assert result.source == "estimated"
    assert result.usage.input_tokens == 50
    assert 300 <= result.usage.output_tokens <= 1000
    assert not meter.finished


def test_an_answer_without_usage_is_estimated():
    """FINDINGS 2.4 no. 2: a missing usage is never 0."""
    result = metered("chat", json.dumps({"choices": ["x" * 600]}).encode(), stream=False)[1]
    assert result.source == "estimated"
    assert result.usage.output_tokens >= 150


@pytest.mark.parametrize("junk", [
    b"", b"{", b"[1]", b'{"usage":7}', b'{"usage":{"prompt_tokens":"many"}}', b"\xff\xfe", b'{"usage":' + b"[" * 99_999,
])  # fmt: skip
def test_junk_is_survived(junk):
    """Whatever an upstream sends, the meter gives an estimate."""
    for stream in (False, True):
        assert metered("chat", b"data: " * stream + junk, stream=stream)[1].source == "estimated"


def test_absurd_numbers_are_bounded():
    """Negative counters are 0, endless ones are cut: a broken upstream cannot lower a budget."""
    usage = metered("chat", b'{"usage":{"prompt_tokens":-5,"completion_tokens":1e300}}', stream=False)[1].usage
    assert usage.input_tokens == 0
    assert 0 < usage.output_tokens <= 1 << 40


def test_other_line_ends_are_read():
    """CRLF, and an event whose data stands on two lines."""
    body = (
        b'data: {"choices":[],\r\ndata: "usage":{"prompt_tokens":3,"completion_tokens":4}}\r\n\r\ndata: [DONE]\r\n\r\n'
    )
    assert metered("chat", body, stream=True)[1].usage == Usage(input_tokens=3, output_tokens=4)


def test_memory_is_bounded():
    """An event that never ends is let go of; the result is an estimate."""
    meter = Meter("chat", stream=True)
    piece = b"x" * (8 << 20)
    for _ in range(5):
        meter.feed(piece)
    assert len(meter._kept) <= 32 << 20
    assert meter.finish().source == "estimated"
