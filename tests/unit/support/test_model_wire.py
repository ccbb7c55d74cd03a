"""The fake provider's replies: the answer that is due, and streams that say the same as whole replies."""

import json

import pytest

from support import model_wire
from support.model_wire import Run, Say, ToolCall

SCRIPT = (Run("id"), Run("ls"), Say("done"))
ANTHROPIC_TOOLS = {"tools": [{"name": "Read"}, {"name": "Bash"}]}


def _anthropic_turns(count: int) -> dict[str, object]:
    """Return a request after `count` tool results."""
    results = [{"type": "tool_result", "content": [{"type": "text", "text": f"r{n}"}]} for n in range(count)]
    return {**ANTHROPIC_TOOLS, "messages": [{"role": "user", "content": [item]} for item in results]}


def test_the_script_advances_with_each_tool_result() -> None:
    """The n-th answer is given once the conversation holds n tool results, and the last one repeats."""
    answers = [model_wire.due(SCRIPT, _anthropic_turns(n)) for n in range(4)]

    assert [getattr(answer, "arguments", {}).get("command") for answer in answers] == ["id", "ls", None, None]
    assert answers[2:] == [Say("done"), Say("done")]


def test_a_request_without_tools_gets_the_text() -> None:
    """Requests for titles and summaries, which offer no tool, do not use up the script."""
    assert model_wire.due(SCRIPT, {"messages": [{"role": "user", "content": "hi"}]}) == Say("done")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}]}, ["a"]),
        ({"input": [{"type": "function_call_output", "output": "a"}, {"role": "user", "content": []}]}, ["a"]),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "a"}]}]}, ["a"]),
        ({"messages": ["odd"]}, []),
    ],
)
def test_tool_results_are_found_in_every_protocol(body: dict[str, object], expected: list[str]) -> None:
    """What a command printed is found whichever protocol carries it."""
    assert model_wire.tool_results(body) == expected


@pytest.mark.parametrize("answer", [Say("FAKE-OK"), ToolCall(3, "bash", {"command": "id"})])
def test_streams_say_what_the_whole_reply_says(answer: Say | ToolCall) -> None:
    """In all three protocols the events add up to the reply that is not streamed."""
    whole, events = model_wire.anthropic("m", answer)
    delta = next(data["delta"] for name, data in events if name == "content_block_delta" and isinstance(data, dict))
    block = whole["content"][0]
    assert delta.get("text") == block.get("text")
    assert json.loads(delta.get("partial_json", "null")) == block.get("input")

    whole, events = model_wire.chat("m", answer)
    first = next(data for _, data in events if isinstance(data, dict))["choices"][0]["delta"]
    message = whole["choices"][0]["message"]
    assert first["content"] == message["content"]
    assert [call["function"] for call in first.get("tool_calls", [])] == [
        call["function"] for call in message.get("tool_calls", [])
    ]

    whole, events = model_wire.responses("m", answer)
    assert list(events)[-1][1]["response"] == whole


def test_a_command_can_have_further_arguments():
    """A script may set other arguments of the shell tool, as a hostile model would."""
    body = {"tools": [{"name": "Bash"}], "messages": []}
    call = model_wire.due([Run("ls", {"dangerouslyDisableSandbox": True})], body)
    assert call.arguments["command"] == "ls"
    assert call.arguments["dangerouslyDisableSandbox"] is True
