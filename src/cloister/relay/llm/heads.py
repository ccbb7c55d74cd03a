"""The head that a client's head became on its way to an upstream, kept for the next request with the same one."""

from __future__ import annotations

from cloister.llm import upstreams
from cloister.llm.upstreams import Headers
from cloister.relay.llm.supply import Supply


class Heads:
    """The last head that was written for one head of a client.

    It is written anew when anything differs that it was made of: the upstream, or our lines with the key. The
    client's fields do not: but for Content-Length, which is ours, they are those of the known head.
    """

    __slots__ = ("_lines", "_made", "_supply")

    def __init__(self) -> None:
        """Begin without any."""
        self._supply: Supply | None = None
        self._lines = self._made = b""

    def known(self, supply: Supply, lines: bytes) -> bytes:
        """Return the head but for its end, or nothing where it has to be written first."""
        return self._made if self._lines is lines and self._supply is supply else b""

    def make(self, supply: Supply, method: str, target: str, headers: Headers, lines: bytes) -> bytes:
        """Write the head but for its end; see `upstreams.request_fields`."""
        self._made = upstreams.request_fields(supply.upstream, method, target, headers, lines)
        self._supply, self._lines = supply, lines
        return self._made
