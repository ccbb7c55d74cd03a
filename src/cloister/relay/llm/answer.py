"""An answer on its way to the client: counted, and passed on as it came.

Events are forwarded in the pieces in which they arrive. Only where we asked for usage in the agent's place are whole
events held back, until it is known that they are not the one that the agent did not ask for.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol

import msgspec

from cloister.llm.routes import Shape
from cloister.llm.usage import MAX_KEPT, Meter, Metered

_WBITS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
HEARTBEAT = b": cloister waits\n\n"


class _Chunk(msgspec.Struct):
    choices: Any = None
    usage: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class _Inflater(Protocol):
    def decompress(self, data: bytes, max_length: int = 0, /) -> bytes: ...

    @property
    def unconsumed_tail(self) -> bytes: ...


class Answer:
    """The body of one answer."""

    __slots__ = ("_held", "_hide", "_inflater", "_line_end", "_shape", "bytes", "coded", "meter", "stream")

    def __init__(self, shape: Shape, *, stream: bool, hide: bool, coding: bytes = b"") -> None:
        """Begin.

        Args:
            shape: of the protocol.
            stream: whether it is made of events.
            hide: whether the chunk that holds only usage is kept back.
            coding: the Content-Encoding, which upstreams were asked not to use.
        """
        self.meter = Meter(shape, stream=stream)
        self.stream = stream
        self._shape = shape
        self.bytes = 0
        self.coded = coding.strip().lower() not in {b"", b"identity"}
        self._hide = hide and stream and not self.coded
        self._held = b""
        self._line_end = b"\n\n"
        self._inflater: _Inflater | None = None
        if self.coded and coding.strip().lower() in _WBITS:
            self._inflater = zlib.decompressobj(_WBITS[coding.strip().lower()])

    @property
    def between_events(self) -> bool:
        """Whether an event of ours would fit in here."""
        return self.stream and not self.coded and not self._held and self._line_end == b"\n\n"

    def is_cut(self, framing: str) -> bool:
        """Say whether a stream ended without the last word of its protocol.

        Some compatible servers leave `[DONE]` out, so for Chat Completions only a connection that just ended tells.
        """
        if not self.stream or self.coded or self.meter.finished:
            return False
        return self._shape != "chat" or framing == "close"

    def take(self, data: bytes) -> bytes:
        """Count a piece; return what goes on to the client now."""
        self.bytes += len(data)
        if not self.coded:
            self.meter.feed(data)
        elif self._inflater is not None:
            self._inflate(data)
        if self._hide:
            data = self._without_usage(data)
        if data.endswith(b"\n\n"):
            self._line_end = b"\n\n"
        elif data:
            tail = data[-4:].replace(b"\r", b"")
            self._line_end = tail[-2:] if len(tail) > 1 else self._line_end[-1:] + tail
        return data

    def rest(self) -> bytes:
        """Return what was held back, at the end of the body."""
        held, self._held = self._held, b""
        return held

    def finish(self) -> Metered:
        """Return what was used."""
        return self.meter.finish()

    def _inflate(self, data: bytes) -> None:
        """Read a compressed answer for its counters; a bomb is given up, not unpacked."""
        assert self._inflater is not None  # noqa: S101 - asked before
        try:
            plain = self._inflater.decompress(data, MAX_KEPT)
        except zlib.error:
            self._inflater = None
            return
        if self._inflater.unconsumed_tail:
            self._inflater = None
        self.meter.feed(plain)

    def _without_usage(self, data: bytes) -> bytes:
        """Return the complete events of what there is, without the one that holds nothing but usage."""
        data = self._held + data
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
        if end < 4 or len(data) > MAX_KEPT:  # noqa: PLR2004 - neither was found
            if len(data) > MAX_KEPT:
                self._held, self._hide = b"", False
                return data
            self._held = data
            return b""
        whole, self._held = data[:end], data[end:]
        if b'"usage"' not in whole:
            return whole
        mark = b"\r\n\r\n" if b"\r\n\r\n" in whole else b"\n\n"
        return b"".join(event + mark for event in whole.split(mark)[:-1] if not _only_usage(event))


def _only_usage(event: bytes) -> bool:
    """Say whether a chunk has usage and no choices."""
    if b'"usage"' not in event:
        return False
    text = b"\n".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
    try:
        chunk = _decode(text)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError):
        return False
    return chunk.choices == [] and chunk.usage is not None
