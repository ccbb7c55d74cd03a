"""Watches what leaves for placeholders: they belong to the broker, and to no server.

A placeholder opens nothing anywhere else. But whoever sends one to a strange host was told to,
so the request is refused and recorded. In a body for the credential's own host it passes, as it
is: there it is as worthless, and a model's prompt often holds what the agent printed.
"""

from __future__ import annotations

from cloister.egress.decision import Verdict
from cloister.relay.session import Broker

HOLD_S = 0.005
"""How long the last bytes of a piece wait for the next one. A body that answers to answers (gRPC) has to go on."""

MISDIRECTED = Verdict(
    "deny",
    "placeholder-misdirected",
    explanation="the request carries a placeholder of a credential to a place, or in a part, it is not meant for",
    remedy="send it only to the host the credential is bound to, in the header or parameter that carries it",
)

REVOKED = Verdict(
    "deny", "credential-revoked", explanation="the credential of this request was taken back while the run lasts"
)


class Watch:
    """Watches one request body. The end of each piece waits, since a placeholder may go on in the next."""

    def __init__(self, broker: Broker, place: tuple[str, int] | None = None) -> None:
        """Ask this broker what a placeholder looks like; `place` is what its `leaks` wants to know."""
        self._broker, self._place = broker, place
        self._held = b""
        self._passed = b""
        self.broken = False
        """Whether a placeholder was seen; nothing passes any more."""

    @property
    def holds(self) -> bool:
        """Whether bytes wait."""
        return bool(self._held)

    def feed(self, data: bytes) -> bytes:
        """Take a piece, and return what may leave now."""
        overlap = self._broker.overlap
        waiting = self._held + data
        if self.broken or self._broker.leaks(self._passed + waiting, self._place):
            self.broken = True
            return b""
        cut = max(len(waiting) - overlap, 0)
        self._held = waiting[cut:]
        self._remember(waiting[:cut], overlap)
        return waiting[:cut]

    def flush(self) -> bytes:
        """Return what waits: nothing follows, or nothing came for a while."""
        held, self._held = self._held, b""
        self._remember(held, self._broker.overlap)
        return held

    def _remember(self, data: bytes, overlap: int) -> None:
        """Keep the end of what has left, to recognize the rest of a placeholder that began there."""
        self._passed = (self._passed + data[-overlap:])[-overlap:] if overlap else b""
