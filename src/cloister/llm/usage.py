"""What a call used, read from the answer as it passes: JSON or server-sent events, in any division into pieces.

The counters of four families are brought to disjoint kinds (`tokens.Usage`): Anthropic's `input_tokens` exclude
cached ones, those of OpenAI include them; llama.cpp tells `timings`; OpenRouter its own cost. A later number replaces
an earlier one, and an explicit 0 is a number. Where the upstream told nothing, or the stream broke before its last
word, what arrived is estimated, and the result says so. Nothing here changes a byte.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from cloister.llm.ledger import Source
from cloister.llm.routes import Shape
from cloister.llm.tokens import Usage

MAX_KEPT = 32 * 1024 * 1024
"""Bytes of one answer, or of one event, that are kept to be read. What is longer is estimated."""

_SMALL_EVENT = 110
"""About what an event of a stream has around its few characters of text."""
_CHARACTERS_PER_TOKEN = 3
_MOST = 1 << 40

Number = int | float | None


class _Details(msgspec.Struct):
    cached_tokens: Number = None
    cache_write_tokens: Number = None
    reasoning_tokens: Number = None


class _Written(msgspec.Struct):
    ephemeral_5m_input_tokens: Number = None
    ephemeral_1h_input_tokens: Number = None


class _Usage(msgspec.Struct):
    input_tokens: Number = None
    output_tokens: Number = None
    cache_read_input_tokens: Number = None
    cache_creation_input_tokens: Number = None
    cache_creation: _Written | None = None
    prompt_tokens: Number = None
    completion_tokens: Number = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cost: Number = None


class _Timings(msgspec.Struct):
    prompt_n: Number = None
    cache_n: Number = None
    predicted_n: Number = None


class _Inner(msgspec.Struct):
    usage: _Usage | None = None
    model: str | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None
    model: str | None = None
    message: _Inner | None = None
    response: _Inner | None = None
    timings: _Timings | None = None


_decode = msgspec.json.Decoder(_Answer).decode
_NOTHING = _Answer()

_COUNTERS = tuple(
    name for name in _Usage.__struct_fields__ if not name.endswith("_details") and name != "cache_creation"
)
_DETAILS = tuple(name for name in _Usage.__struct_fields__ if name.endswith("_details"))

_LAST_WORDS: dict[Shape, tuple[bytes, ...]] = {
    "anthropic": (b'"message_stop"', b'"error"'),
    "chat": (b"data: [DONE]", b"data:[DONE]", b'"error"'),
    "responses": (b'"response.completed"', b'"response.incomplete"', b'"response.failed"', b'"error"'),
}


class Metered(NamedTuple):
    """The result of a meter."""

    usage: Usage
    source: Source
    model: str
    """As the upstream named it; empty when it did not."""


class Meter:
    """Reads one answer."""

    __slots__ = (
        "_details",
        "_kept",
        "_lost",
        "_sent",
        "_shape",
        "_stream",
        "_timings",
        "_written",
        "counters",
        "events",
        "final",
        "finished",
        "model",
    )

    def __init__(self, shape: Shape, *, stream: bool) -> None:
        """Begin; `stream` says whether the answer is made of events."""
        self._shape, self._stream = shape, stream
        self._kept = bytearray()
        self._lost = False
        self._sent = 0
        self._details: list[_Details] = []
        self._written: _Written | None = None
        self._timings: _Timings | None = None
        self.counters: dict[str, Number] = {}
        self.model = ""
        self.events = 0
        self.final = False
        """Whether the upstream told how much the whole output was."""
        self.finished = not stream
        """Whether a stream came to the end that its protocol gives it."""

    def feed(self, data: bytes) -> None:
        """Take a piece of the body, after its transfer coding."""
        kept = self._kept
        if not self._stream:
            self._sent += len(data)
            if not self._lost:
                kept += data
                self._bound()
            return
        if b"\r" in data or (kept and kept[-1] == 13):  # noqa: PLR2004 - a carriage return held back
            data = bytes(kept) + data
            kept.clear()
            held = data.endswith(b"\r")
            data = data[: len(data) - held].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\r" * held
        if not kept and data.endswith(b"\n\n"):
            self._read(data)
            return
        begin = max(0, len(kept) - 1)
        kept += data
        end = kept.rfind(b"\n\n", begin)
        if end >= 0:
            self._read(bytes(kept[: end + 2]))
            del kept[: end + 2]
        self._bound()

    def finish(self) -> Metered:
        """Return what was used; nothing may be fed afterwards."""
        if not self._stream and not self._lost:
            self._take(bytes(self._kept))
            self.final = bool(self.counters) or self._timings is not None
        elif self._kept:
            self._read(bytes(self._kept) + b"\n\n")
        self._kept.clear()
        usage = self._usage()
        if self.final:
            return Metered(usage, "provider", self.model)
        output = max(usage.output_tokens, self._estimated())
        return Metered(msgspec.structs.replace(usage, output_tokens=output), "estimated", self.model)

    # Inside.

    def _bound(self) -> None:
        if len(self._kept) > MAX_KEPT:
            self._lost = True
            self._sent += len(self._kept) if self._stream else 0
            self._kept.clear()

    def _read(self, block: bytes) -> None:
        """Look at complete events; only those that may hold a counter are parsed."""
        self._sent += len(block)
        self.events += block.count(b"\n\n")
        if not self.finished:
            for word in _LAST_WORDS[self._shape]:  # as a loop: this runs with every piece of every stream
                if word in block:
                    self.finished = True
        if b'"usage"' not in block and b'"timings"' not in block:
            return
        for event in block.split(b"\n\n"):
            if b'"usage"' not in event and b'"timings"' not in event:
                continue
            lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
            self._take(b"\n".join(lines))

    def _take(self, text: bytes) -> None:
        """Take the counters of one JSON text."""
        try:
            answer = _decode(text)
        except (msgspec.DecodeError, msgspec.ValidationError, RecursionError):
            return
        for part in (answer.message, answer.response, answer):
            if part is None:
                continue
            if part.model:
                self.model = part.model
            if part.usage is not None:
                self._add(part.usage, first=part is answer.message)
        if answer.timings is not None and not self.counters:
            self._timings, self.final = answer.timings, True

    def _add(self, usage: _Usage, *, first: bool) -> None:
        """Take one usage object; what it leaves out stays as it was."""
        told = False
        counters = self.counters
        for name in _COUNTERS:
            if (value := getattr(usage, name)) is not None:
                counters[name] = value
                told = True
        for details in _DETAILS:
            if (one := getattr(usage, details)) is not None:
                self._details.append(one)
        self._written = usage.cache_creation or self._written
        # `message_start` tells the input and the output so far; everything else comes at the end.
        self.final = self.final or (told and not first)

    def _usage(self) -> Usage:
        """Return the counters in disjoint kinds."""
        if not self.counters and self._timings is not None:
            return Usage(
                input_tokens=_whole(self._timings.prompt_n),
                cache_read_tokens=_whole(self._timings.cache_n),
                output_tokens=_whole(self._timings.predicted_n),
            )
        get = self.counters.get
        cost = get("cost")
        if self._shape == "anthropic":
            written = _whole(get("cache_creation_input_tokens"))
            long = _whole(self._written.ephemeral_1h_input_tokens) if self._written else 0
            short = _whole(self._written.ephemeral_5m_input_tokens) if self._written else 0
            return Usage(
                input_tokens=_whole(get("input_tokens")),
                cache_read_tokens=_whole(get("cache_read_input_tokens")),
                cache_write_5m_tokens=max(short, written - long),
                cache_write_1h_tokens=long,
                output_tokens=_whole(get("output_tokens")),
                reasoning_tokens=self._detail("reasoning_tokens"),
                cost_usd=None if cost is None else max(0.0, float(cost)),
            )
        inputs = _whole(_first(get("prompt_tokens"), get("input_tokens")))
        cached = min(self._detail("cached_tokens"), inputs)
        stored = min(self._detail("cache_write_tokens"), inputs - cached)
        return Usage(
            input_tokens=inputs - cached - stored,
            cache_read_tokens=cached,
            cache_write_5m_tokens=stored,
            output_tokens=_whole(_first(get("completion_tokens"), get("output_tokens"))),
            reasoning_tokens=self._detail("reasoning_tokens"),
            cost_usd=None if cost is None else max(0.0, float(cost)),
        )

    def _detail(self, name: str) -> int:
        """Return the last detail of this name."""
        told = [value for one in self._details if (value := getattr(one, name)) is not None]
        return _whole(told[-1]) if told else 0

    def _estimated(self) -> int:
        """Return the output tokens that what arrived may be: at least one for each event with text."""
        if not self._stream:
            return self._sent // _CHARACTERS_PER_TOKEN
        text = max(0, self._sent + len(self._kept) - self.events * _SMALL_EVENT)
        return max(self.events, text // _CHARACTERS_PER_TOKEN)


def read_answer(text: bytes, shape: Shape) -> Metered:
    """Return what a whole answer that is not a stream tells. The same as a `Meter` does, with less ado where it can."""
    if shape == "anthropic" and len(text) <= MAX_KEPT:
        try:
            answer = _decode(text)
        except (msgspec.DecodeError, msgspec.ValidationError, RecursionError):
            answer = _NOTHING
        usage = answer.usage
        elsewhere = answer.message or answer.response or answer.timings
        if usage is not None and usage.output_tokens is not None and not elsewhere and not _has_more(usage):
            return Metered(_of_anthropic(usage), "provider", answer.model or "")
    meter = Meter(shape, stream=False)
    meter.feed(text)
    return meter.finish()


def _has_more(usage: _Usage) -> bool:
    """Say whether it has counters that Anthropic's own answers have not: they are for the meter."""
    inputs = usage.input_tokens_details or usage.prompt_tokens_details
    outputs = usage.output_tokens_details or usage.completion_tokens_details
    return usage.cost is not None or inputs is not None or outputs is not None


def _of_anthropic(usage: _Usage) -> Usage:
    """Return the counters of Anthropic's own answers, which has them in one place."""
    written, inner = _whole(usage.cache_creation_input_tokens), usage.cache_creation
    long = _whole(inner.ephemeral_1h_input_tokens) if inner else 0
    short = _whole(inner.ephemeral_5m_input_tokens) if inner else 0
    return Usage(
        input_tokens=_whole(usage.input_tokens),
        cache_read_tokens=_whole(usage.cache_read_input_tokens),
        cache_write_5m_tokens=max(short, written - long),
        cache_write_1h_tokens=long,
        output_tokens=_whole(usage.output_tokens),
    )


def _whole(value: Number) -> int:
    """Return a counter as a number that can be added: never negative, never absurd."""
    if type(value) is int and 0 <= value <= _MOST:
        return value
    if value is None or value != value:  # noqa: PLR0124 - not a number
        return 0
    return int(min(max(value, 0), _MOST))


def _first(*values: Number) -> Number:
    return next((value for value in values if value is not None), None)
