"""The three wire protocols of model providers, as values: what a request asks for, and the reply to it.

Pure: bytes and JSON in, JSON and server-sent events out; `fake_model` carries them. Only what
Claude Code, Pi and Codex use is here, in the shapes that the providers document (Anthropic
Messages; OpenAI Chat Completions and Responses). Not a model: a reply is chosen by counting.

A script is a list of answers. The one that is due is found from the request alone (as many
answers are behind us as the conversation holds tool results), so a retry gets the same answer
and requests may arrive in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Json = dict[str, Any]
Event = tuple[str, Json | str]
"""A server-sent event: its name (may be empty) and its data."""

INPUT_TOKENS = 11
OUTPUT_TOKENS = 5


@dataclass(frozen=True)
class Say:
    """Answer with this text, which ends the agent's turn."""

    text: str


@dataclass(frozen=True)
class Run:
    """Ask the agent to run this command with its shell tool, with further arguments for that tool."""

    command: str
    arguments: Json = field(default_factory=dict)


Answer = Say | Run


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the request offered; `number` tells it from the calls before it."""

    number: int
    name: str
    arguments: Json


def due(script: Sequence[Answer], body: Json) -> Say | ToolCall:
    """Return what to answer: the script's next item, or its last text when no shell tool was offered.

    Agents also ask for titles and summaries; those requests offer no tool and get the text.
    """
    done = len(tool_results(body))
    answer = script[min(done, len(script) - 1)]
    if isinstance(answer, Run):
        call = _shell_call(body, done, answer.command)
        if call is not None:
            return replace(call, arguments={**call.arguments, **answer.arguments})
        texts = [item for item in script if isinstance(item, Say)]
        return texts[-1] if texts else Say("no shell tool was offered")
    return answer


def tool_names(body: Json) -> list[str]:
    """Return the names of the tools that a request offers, in any of the three protocols."""
    tools = body.get("tools") or []
    return [tool.get("name") or tool.get("function", {}).get("name") or tool.get("type", "") for tool in tools]


def tool_results(body: Json) -> list[str]:
    """Return the output of every tool call in the conversation so far, oldest first."""
    results = []
    for item in body.get("messages") or body.get("input") or []:
        if not isinstance(item, dict):
            continue
        if item.get("role") == "tool" or str(item.get("type", "")).endswith("_call_output"):
            results.append(_text(item.get("content") or item.get("output")))
        elif isinstance(item.get("content"), list):
            results += [_text(part.get("content")) for part in item["content"] if part.get("type") == "tool_result"]
    return results


def _text(content: object) -> str:
    """Flatten a string or a list of text parts."""
    if isinstance(content, list):
        return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
    return "" if content is None else str(content)


def _shell_call(body: Json, number: int, command: str) -> ToolCall | None:
    """Return a call of the first shell tool offered, with the arguments which that agent's tool takes."""
    arguments: dict[str, Json] = {
        "Bash": {"command": command, "description": "Run what the test asks for"},  # Claude Code
        "bash": {"command": command},  # Pi
        "exec_command": {"cmd": command},  # Codex, unified exec
        "exec": {"command": command},  # OpenClaw
        "shell_command": {"command": command},  # Codex
        "shell": {"command": ["/bin/bash", "-c", command]},  # Codex, older
    }
    return next((ToolCall(number, name, arguments[name]) for name in tool_names(body) if name in arguments), None)


def anthropic(model: str, answer: Say | ToolCall) -> tuple[Json, Iterator[Event]]:
    """Return the reply of `POST /v1/messages`: whole, and as events."""
    if isinstance(answer, ToolCall):
        stop = "tool_use"
        empty: Json = {"type": "tool_use", "id": f"toolu_{answer.number:02}", "name": answer.name, "input": {}}
        block = {**empty, "input": answer.arguments}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(answer.arguments)}
    else:
        stop = "end_turn"
        empty = {"type": "text", "text": ""}
        block = {"type": "text", "text": answer.text}
        delta = {"type": "text_delta", "text": answer.text}
    usage = {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS}
    message: Json = {"id": "msg_01", "type": "message", "role": "assistant", "model": model, "stop_sequence": None}
    whole = {**message, "content": [block], "stop_reason": stop, "usage": usage}
    opened = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    ended = {"stop_reason": stop, "stop_sequence": None}
    events: list[Json] = [
        {"type": "message_start", "message": opened},
        {"type": "content_block_start", "index": 0, "content_block": empty},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": ended, "usage": {"output_tokens": OUTPUT_TOKENS}},
        {"type": "message_stop"},
    ]
    return whole, ((event["type"], event) for event in events)


def chat(model: str, answer: Say | ToolCall) -> tuple[Json, Iterator[Event]]:
    """Return the reply of `POST /v1/chat/completions`: whole, and as events."""
    if isinstance(answer, ToolCall):
        function = {"name": answer.name, "arguments": json.dumps(answer.arguments)}
        call: Json = {"id": f"call_{answer.number:02}", "type": "function", "function": function}
        message: Json = {"role": "assistant", "content": None, "tool_calls": [call]}
        delta: Json = {**message, "tool_calls": [{"index": 0, **call}]}
        finish = "tool_calls"
    else:
        message = {"role": "assistant", "content": answer.text}
        delta = message
        finish = "stop"
    usage = {
        "prompt_tokens": INPUT_TOKENS,
        "completion_tokens": OUTPUT_TOKENS,
        "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
    }
    base: Json = {"id": "chatcmpl-01", "created": 1_700_000_000, "model": model}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    whole = {**base, "object": "chat.completion", "choices": [choice], "usage": usage}
    chunk = {**base, "object": "chat.completion.chunk"}
    events: list[Event] = [
        ("", {**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}),
        ("", {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}], "usage": usage}),
        ("", "[DONE]"),
    ]
    return whole, iter(events)


def responses(model: str, answer: Say | ToolCall) -> tuple[Json, Iterator[Event]]:
    """Return the reply of `POST /v1/responses`: whole, and as events."""
    if isinstance(answer, ToolCall):
        arguments = json.dumps(answer.arguments)
        number = f"{answer.number:02}"
        item: Json = {"id": f"fc_{number}", "type": "function_call", "status": "completed", "call_id": f"call_{number}"}
        item |= {"name": answer.name, "arguments": arguments}
        begun = {**item, "status": "in_progress", "arguments": ""}
        middle = [
            {"type": "response.function_call_arguments.delta", "item_id": item["id"], "delta": arguments},
            {"type": "response.function_call_arguments.done", "item_id": item["id"], "arguments": arguments},
        ]
    else:
        part = {"type": "output_text", "text": answer.text, "annotations": []}
        item = {"id": "msg_01", "type": "message", "status": "completed", "role": "assistant", "content": [part]}
        begun = {**item, "status": "in_progress", "content": []}
        place: Json = {"item_id": "msg_01", "content_index": 0}
        middle = [
            {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
            {"type": "response.output_text.delta", **place, "delta": answer.text},
            {"type": "response.output_text.done", **place, "text": answer.text},
            {"type": "response.content_part.done", **place, "part": part},
        ]
    opened: Json = {"id": "resp_01", "object": "response", "created_at": 1_700_000_000, "model": model}
    opened |= {"status": "in_progress", "output": []}
    whole = {**opened, "status": "completed", "output": [item], "usage": _responses_usage()}
    events: list[Json] = [
        {"type": "response.created", "response": opened},
        {"type": "response.output_item.added", "output_index": 0, "item": begun},
        *({**event, "output_index": 0} for event in middle),
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": whole},
    ]
    return whole, ((event["type"], {**event, "sequence_number": n}) for n, event in enumerate(events))


def _responses_usage() -> Json:
    """Return the token counts in the form of the Responses protocol."""
    return {
        "input_tokens": INPUT_TOKENS,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": OUTPUT_TOKENS,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
    }
