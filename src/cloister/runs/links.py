"""What runs ask of a frame connection, without knowing the event loop's own (`services/connection.py`)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Protocol

from cloister.host.frames import Frame


class Link(Protocol):
    """A frame connection, as the broker's event loop offers it."""

    closed: bool

    @property
    def peer_pid(self) -> int:
        """The process at the other end, by the kernel's word (unix(7), SO_PEERCRED)."""

    def send(self, kind: str, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        """Queue a frame; copies of the descriptors travel."""

    def hear(self) -> None:
        """Take in, now, what the other end has said already."""

    def close(self) -> None:
        """Close when everything is sent."""

    def rebind(self, on_frame: Callable[[Any, Frame], None], on_close: Callable[[Any], None]) -> None:
        """Give the connection to another owner."""

    def lend(self) -> int:
        """Stop reading, for somebody else shall; return the descriptor to hand on, which stays ours."""


class Connect(Protocol):
    """How to make a link from a socket, which belongs to the link from then on."""

    def __call__(
        self, sock: socket.socket, on_frame: Callable[[Any, Frame], None], on_close: Callable[[Any], None]
    ) -> Any:
        """Return the link."""
