"""Masks secrets in a stream: each byte of each occurrence becomes `*`, so lengths and framing stay.

Occurrences are found across the borders of pieces and where they overlap. Only bytes that could
be the beginning of a secret wait for what follows, everything else passes at once. It finds
the byte strings it was given and no other spelling of them (compressed, escaped, cut in two by
somebody else's framing).
"""

from __future__ import annotations

from collections.abc import Iterable


class Masker:
    """Masks one stream."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        """Take the byte strings to mask; empty ones are ignored."""
        self._secrets = tuple({secret for secret in secrets if secret})
        self._longest = max(map(len, self._secrets), default=0)
        self._held = b""
        self._spans: list[tuple[int, int]] = []  # what of the held bytes is masked already

    def feed(self, data: bytes) -> bytes:
        """Take a piece and return what is certain so far."""
        buffer = self._held + data if self._held else data
        spans = self._spans + _occurrences(buffer, self._secrets)
        cut = len(buffer) - self._undecided(buffer)
        self._held = buffer[cut:]
        self._spans = [(max(start - cut, 0), end - cut) for start, end in spans if end > cut]
        return _masked(buffer[:cut], spans)

    def flush(self) -> bytes:
        """Return what was held back: nothing follows."""
        held, spans = self._held, self._spans
        self._held, self._spans = b"", []
        return _masked(held, spans)

    def mask(self, data: bytes) -> bytes:
        """Mask a byte string that stands for itself, such as the value of a header."""
        return _masked(data, _occurrences(data, self._secrets))

    def _undecided(self, buffer: bytes) -> int:
        """Return the length of the longest end of the buffer with which a secret could begin."""
        tail = buffer[-(self._longest - 1) :] if self._longest > 1 else b""
        longest = 0
        for secret in self._secrets:
            at = tail.find(secret[:1], max(len(tail) - len(secret) + 1, 0))
            while at >= 0 and len(tail) - at > longest:
                if secret.startswith(tail[at:]):
                    longest = len(tail) - at
                    break
                at = tail.find(secret[:1], at + 1)
        return longest


def _occurrences(data: bytes, secrets: Iterable[bytes]) -> list[tuple[int, int]]:
    """Return start and end of every occurrence, also of those that overlap."""
    spans = []
    for secret in secrets:
        at = data.find(secret)
        while at >= 0:
            spans.append((at, at + len(secret)))
            at = data.find(secret, at + 1)
    return spans


def _masked(data: bytes, spans: list[tuple[int, int]]) -> bytes:
    """Return the bytes with the spans, cut at their end, starred."""
    if not spans:
        return data
    shown = bytearray(data)
    for start, end in spans:
        stop = min(end, len(shown))
        shown[start:stop] = b"*" * max(stop - start, 0)
    return bytes(shown)
