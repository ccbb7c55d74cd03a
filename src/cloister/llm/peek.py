"""What a request asks for, read from its raw bytes, and small changes made to those bytes.

A body is never serialised again: prompt caches and signatures hang on its bytes. So every value comes with the place
where it stands, and changes (`splice`) leave everything else as it was. What two JSON readers could read differently
is refused: a key twice, a key that differs from one of ours in case only (Go's encoding/json takes both for the
same), bytes that are not UTF-8. Values inside the messages are not looked at.

Only the object's own members are found, without a parser of our own: msgspec checks the whole text and gives each
value's bytes, and `members` then verifies that exactly these members, in this order, make up the text.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from cloister.llm.routes import Route

_SPACE = rb"[ \t\n\r]*"
_OPEN = re.compile(_SPACE + rb"\{")
_KEY = re.compile(_SPACE + rb'"((?:[^"\\]|\\.)*)"' + _SPACE + rb":" + _SPACE, re.DOTALL)
_NEXT = re.compile(_SPACE + rb"([,}])")

_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_any = msgspec.json.Decoder().decode

MAX_TOKENS = 1 << 40
"""A bound beyond any real one, so that arithmetic stays small."""


class BodyError(Exception):
    """A body that is refused: `body-invalid`, `body-ambiguous`, `model-missing` or `feature-unmetered`."""

    def __init__(self, reason: str, explanation: str) -> None:
        """Keep both."""
        super().__init__(explanation)
        self.reason, self.explanation = reason, explanation


class Member(NamedTuple):
    """One member of an object: where its value stands, from the first byte to after the last."""

    start: int
    end: int


class Edit(NamedTuple):
    """Bytes to put in the place of others; nothing is replaced where start is end."""

    start: int
    end: int
    data: bytes


class Peek(NamedTuple):
    """What was found in a body."""

    model: str
    models: tuple[str, ...]
    """Further models that the upstream may take instead (OpenRouter's `models`)."""
    stream: bool
    output_limit: int | None
    """The smallest bound on output tokens that the request sets."""
    choices: int
    """How many answers are asked for (`n`); each may use the whole output."""
    asks_usage: bool
    """Whether the agent itself asked for usage in a stream (`stream_options.include_usage`)."""
    continues: bool
    """Whether the upstream adds context of its own that is not in these bytes (Responses)."""
    members: dict[str, Member]
    inside: int
    """Where a new member can be put in: right behind the opening brace."""


_WATCHED = frozenset(
    {
        "model", "models", "stream", "n", "max_tokens", "max_completion_tokens", "max_output_tokens", "stream_options",
        "background", "previous_response_id", "conversation", "prompt",
    }
)  # fmt: skip


def members(text: bytes) -> tuple[int, dict[str, Member]]:
    """Return where the inside of a JSON object begins, and its members.

    Raises:
        BodyError: it is no JSON object, or one of its keys stands there twice.
    """
    try:
        if not text.isascii():
            text.decode("utf-8")  # overlong forms could spell a key that only some readers see
        values = _raw(text)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise BodyError("body-invalid", f"the body is no JSON object: {error}") from None
    opening = _OPEN.match(text)
    if opening is None:
        raise BodyError("body-invalid", "the body is no JSON object")
    inside = position = opening.end()
    found: dict[str, Member] = {}
    last = b","
    for name, value in values.items():
        key = _KEY.match(text, position)
        raw = bytes(value)
        if last != b"," or key is None or _spelled(key[1]) != name or not text.startswith(raw, key.end()):
            raise _ambiguous(name)
        end = key.end() + len(raw)
        closing = _NEXT.match(text, end)
        if closing is None:
            raise _ambiguous(name)
        found[name] = Member(key.end(), end)
        last, position = closing[1], closing.end()
    if values and last != b"}":
        raise _ambiguous("")
    return inside, found


def peek(text: bytes, route: Route) -> Peek:
    """Return what a request asks for.

    Raises:
        BodyError: it cannot be read in one way only, names no model, or uses what escapes the meter.
    """
    inside, found = members(text)
    for name in found:
        plain = name.isascii() and name.islower()
        if not plain and name not in _WATCHED and name.casefold() in _WATCHED:
            raise BodyError("body-ambiguous", f"{name!r} and {name.casefold()!r} are one key to some readers")
    model = _value(text, found, "model", str, "")
    if not model:
        raise BodyError("model-missing", "the request names no model")
    if _value(text, found, "background", bool, default=False):
        raise BodyError("feature-unmetered", "an answer made in the background would not be counted: leave it out")
    limits = [bound for key in route.limits if (bound := _value(text, found, key, int, None)) is not None]
    if any(bound < 0 for bound in limits):
        raise BodyError("body-invalid", "the bound of the output is negative")
    choices = _value(text, found, "n", int, 1)
    further = _value(text, found, "models", list, [])
    if not all(isinstance(one, str) for one in further):
        raise BodyError("body-invalid", "`models` holds names")
    return Peek(
        model=model,
        models=tuple(further),
        stream=_value(text, found, "stream", bool, default=False),
        output_limit=min(*limits, MAX_TOKENS) if limits else None,
        choices=min(max(choices, 1), 1024),
        asks_usage=_asks_usage(text, found),
        continues=route.name == "responses" and any(
            _present(text, found, key) for key in ("previous_response_id", "conversation", "prompt")
        ),
        members=found,
        inside=inside,
    )  # fmt: skip


def put(peeked: Peek, name: str, value: bytes) -> Edit:
    """Return the change that gives a top-level key this value (JSON), in the place of the one it has."""
    if name in peeked.members:
        start, end = peeked.members[name]
        return Edit(start, end, value)
    return Edit(peeked.inside, peeked.inside, b'"%b":%b,' % (name.encode("ascii"), value))


def put_usage(text: bytes, peeked: Peek) -> Edit:
    """Return the change that asks for usage in a stream of Chat Completions, whatever options there are already."""
    place = peeked.members.get("stream_options")
    if place is None or text[place.start : place.end] == b"null":
        return put(peeked, "stream_options", b'{"include_usage":true}')
    inside, found = members(text[place.start : place.end])
    if "include_usage" in found:
        start, end = found["include_usage"]
        return Edit(place.start + start, place.start + end, b"true")
    comma = b"," if found else b""
    return Edit(place.start + inside, place.start + inside, b'"include_usage":true' + comma)


def splice(text: bytes, edits: list[Edit]) -> bytes:
    """Return the text with changes made, which must not overlap."""
    if not edits:
        return text
    parts: list[bytes] = []
    position = 0
    for edit in sorted(edits):
        parts += (text[position : edit.start], edit.data)
        position = edit.end
    parts.append(text[position:])
    return b"".join(parts)


def _asks_usage(text: bytes, found: dict[str, Member]) -> bool:
    place = found.get("stream_options")
    if place is None or text[place.start : place.end] == b"null":
        return False
    part = text[place.start : place.end]
    if not part.startswith(b"{"):
        raise BodyError("body-invalid", "`stream_options` is an object")
    inner = members(part)[1]
    if any(name != "include_usage" and name.casefold() == "include_usage" for name in inner):
        raise BodyError("body-ambiguous", "`include_usage` is spelled in two ways")
    return bool(_value(part, inner, "include_usage", bool, default=False))


def _present(text: bytes, found: dict[str, Member], name: str) -> bool:
    place = found.get(name)
    return place is not None and text[place.start : place.end] != b"null"


def _value(text: bytes, found: dict[str, Member], name: str, kind: type, default: Any) -> Any:
    """Return a member's value, or the default where it is absent or null."""
    place = found.get(name)
    if place is None:
        return default
    value = _any(text[place.start : place.end])
    if value is None:
        return default
    if type(value) is not kind:
        words = {str: "a string", bool: "true or false", int: "a whole number", list: "a list"}
        raise BodyError("body-invalid", f"`{name}` is {words[kind]}")
    return value


def _spelled(literal: bytes) -> str:
    """Return what the inside of a JSON string stands for."""
    return str(_any(b'"%b"' % literal)) if b"\\" in literal else literal.decode("utf-8")


def _ambiguous(name: str) -> BodyError:
    where = f" near {name[:60]!r}" if name else ""
    return BodyError("body-ambiguous", f"a key stands in the body twice{where}")
