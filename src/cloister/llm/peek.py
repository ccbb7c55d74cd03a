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
_KEY = rb'"([^"\\]*(?:\\.[^"\\]*)*)"' + _SPACE + rb":" + _SPACE
_OPEN = re.compile(_SPACE + rb"(\{)")
_FIRST = re.compile(_SPACE + rb"(?:" + _KEY + rb"|\})", re.DOTALL)
_FOLLOWING = re.compile(_SPACE + rb"(?:," + _SPACE + _KEY + rb"|\})", re.DOTALL)
"""What may stand behind a value: a comma and the next key (group 1), or the end (no group)."""

_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_any = msgspec.json.Decoder().decode

_MOST_MEMBERS = 256
"""Known requests have some dozens; without a bound an agent could keep the event loop busy."""
MAX_TOKENS = 1 << 40
"""A bound beyond any real one, so that arithmetic stays small."""


class BodyError(Exception):
    """A body that is refused: `body-invalid`, `body-ambiguous`, `model-missing` or `feature-unmetered`."""

    def __init__(self, reason: str, explanation: str) -> None:
        """Keep both."""
        super().__init__(explanation)
        self.reason, self.explanation = reason, explanation


Member = tuple[int, int]
"""Where the value of a member stands: from its first byte to after its last."""


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


_KINDS: dict[str, type | None] = {
    "model": str, "models": list, "stream": bool, "n": int, "max_tokens": int, "max_completion_tokens": int,
    "max_output_tokens": int, "stream_options": None, "background": bool, "previous_response_id": None,
    "conversation": None, "prompt": None,
}  # fmt: skip
"""Keys that are read, with the type that a value has unless it is null; None for any."""
_CONTEXT = ("previous_response_id", "conversation", "prompt")
_WORDS = {str: "a string", bool: "true or false", int: "a whole number, not negative", list: "a list"}


def members(text: bytes) -> tuple[int, dict[str, Member]]:
    """Return where the inside of a JSON object begins, and its members.

    Raises:
        BodyError: it is no JSON object, or one of its keys stands there twice.
    """
    return _places(text, _values(text))


def _values(text: bytes) -> dict[str, msgspec.Raw]:
    """Return the members of a JSON object, the last of each name, by their bytes."""
    try:
        if not text.isascii():
            text.decode("utf-8")  # overlong forms could spell a key that only some readers see
        values = _raw(text)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise BodyError("body-invalid", f"the body is no JSON object: {error}") from None
    if len(values) > _MOST_MEMBERS:
        raise BodyError("body-invalid", f"the object has more than {_MOST_MEMBERS} members")
    return values


def _places(text: bytes, values: dict[str, msgspec.Raw]) -> tuple[int, dict[str, Member]]:
    """Return where the inside of an object begins and where its members stand, if there are no others than these."""
    compact = _compact(text, values)
    if compact is not None:
        return 1, compact
    opening = _OPEN.match(text)
    if opening is None:
        raise BodyError("body-invalid", "the body is no JSON object")
    inside = opening.end(1)
    found: dict[str, Member] = {}
    mark = _FIRST.match(text, inside)
    for name, value in values.items():
        key = mark[1] if mark is not None else None
        if mark is None or key is None or (key != name.encode() and _spelled(key) != name):
            raise _ambiguous(name)
        raw, start = bytes(value), mark.end()
        end = start + len(raw)
        if not text.startswith(raw, start):
            raise _ambiguous(name)
        found[name] = (start, end)
        mark = _FOLLOWING.match(text, end)
    if mark is None or mark[1] is not None:
        raise _ambiguous("")
    return inside, found


def _compact(text: bytes, values: dict[str, msgspec.Raw]) -> dict[str, Member] | None:
    """Return the members of an object that is written without spaces, as by most clients; None for any other.

    If the members, put together again, are the text, there is no other one in it: no key twice, none spelled with
    escapes, nothing around them.
    """
    parts = [b'{"']
    found: dict[str, Member] = {}
    place = 0
    for name, value in values.items():
        key, raw = name.encode(), bytes(value)
        start = place + len(key) + 4  # its quotes and its colon, and the brace or comma before it
        place = start + len(raw)
        found[name] = (start, place)
        parts += (key, b'":', raw, b',"')
    parts[-1] = b"}"
    return found if b"".join(parts) == text else None


def peek(text: bytes, route: Route) -> Peek:
    """Return what a request asks for.

    Raises:
        BodyError: it cannot be read in one way only, names no model, or uses what escapes the meter.
    """
    values = _values(text)
    inside, found = _places(text, values)
    told: dict[str, Any] = {}
    for name, raw in values.items():
        if name in _KINDS:
            told[name] = _value(raw, name)
        elif not (name.isascii() and name.islower()) and name.casefold() in _KINDS:
            raise BodyError("body-ambiguous", f"{name!r} and {name.casefold()!r} are one key to some readers")
    get = told.get
    model = get("model")
    if not model:
        raise BodyError("model-missing", "the request names no model")
    if get("background"):
        raise BodyError("feature-unmetered", "an answer made in the background would not be counted: leave it out")
    limits: list[int] = [bound for key in route.limits if (bound := get(key)) is not None]
    further = get("models") or ()
    if further and not all(isinstance(one, str) for one in further):
        raise BodyError("body-invalid", "`models` holds names")
    return Peek(
        model=model,
        models=tuple(further),
        stream=get("stream") or False,
        output_limit=min(*limits, MAX_TOKENS) if limits else None,
        choices=min(max(get("n") or 1, 1), 1024),
        asks_usage="stream_options" in told and _asks_usage(text, found),
        continues=route.name == "responses" and any(get(key) is not None for key in _CONTEXT),
        members=found,
        inside=inside,
    )


def put(peeked: Peek, name: str, value: bytes) -> Edit:
    """Return the change that gives a top-level key this value (JSON), in the place of the one it has."""
    if name in peeked.members:
        start, end = peeked.members[name]
        return Edit(start, end, value)
    return Edit(peeked.inside, peeked.inside, b'"%b":%b,' % (name.encode("ascii"), value))


def put_usage(text: bytes, peeked: Peek) -> Edit:
    """Return the change that asks for usage in a stream of Chat Completions, whatever options there are already."""
    place = peeked.members.get("stream_options")
    if place is None or text[place[0] : place[1]] == b"null":
        return put(peeked, "stream_options", b'{"include_usage":true}')
    inside, found = members(text[place[0] : place[1]])
    if "include_usage" in found:
        start, end = found["include_usage"]
        return Edit(place[0] + start, place[0] + end, b"true")
    comma = b"," if found else b""
    return Edit(place[0] + inside, place[0] + inside, b'"include_usage":true' + comma)


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
    if place is None or text[place[0] : place[1]] == b"null":
        return False
    part = text[place[0] : place[1]]
    if not part.startswith(b"{"):
        raise BodyError("body-invalid", "`stream_options` is an object")
    inner = members(part)[1]
    if any(name != "include_usage" and name.casefold() == "include_usage" for name in inner):
        raise BodyError("body-ambiguous", "`include_usage` is spelled in two ways")
    asked = inner.get("include_usage")
    return asked is not None and part[asked[0] : asked[1]] == b"true"


def _value(raw: msgspec.Raw, name: str) -> Any:
    """Return a member's value, which is null or of its kind."""
    value = _any(raw)
    kind = _KINDS[name]
    if value is None or kind is None:
        return value
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise BodyError("body-invalid", f"`{name}` is {_WORDS[kind]}")
    return value


def _spelled(literal: bytes) -> str:
    """Return what the inside of a JSON string stands for."""
    return str(_any(b'"%b"' % literal)) if b"\\" in literal else literal.decode("utf-8")


def _ambiguous(name: str) -> BodyError:
    where = f" near {name[:60]!r}" if name else ""
    return BodyError("body-ambiguous", f"a key stands in the body twice{where}")
