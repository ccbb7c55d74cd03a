"""What the system's broker says to a user's over the lease of a run, as data (ARCHITECTURE, "Runs under systemd").

    {"run": …} ──▶ {"running": true} ──▶ {"event": …}* ──▶ {"receipt": …}      then the user's closing words, `W`

One JSON value per frame `J`. Both brokers import this, so that neither can say what the other does not know.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cloister.host.frames import FrameError, decode_list, encode_list
from cloister.plan.steps import Plan
from cloister.runs.store import Receipt

MAX_WORDS = 64
"""Closing words beyond these are not shown."""


class Told(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of them."""

    run: Plan | None = None
    """The unit is there, and this is what was decided; from now on the system's broker talks with the caller."""
    running: bool = False
    """The agent has control."""
    event: dict[str, Any] | None = None
    """One line of the run's events."""
    receipt: Receipt | None = None
    """It is over, and nothing of the unit is left."""


def encode(told: Told) -> bytes:
    """Return the payload of a frame `J`."""
    return msgspec.json.encode(told)


def decode(payload: bytes) -> Told:
    """Read the payload of a frame `J`.

    Raises:
        FrameError: it says nothing that is known here.
    """
    try:
        return msgspec.json.decode(payload, type=Told)
    except msgspec.DecodeError as error:
        raise FrameError(f"the system's broker said what is not understood: {error}") from None


def closing_words(warnings: tuple[str, ...]) -> bytes:
    """Return the payload of a frame `W`: what the user's broker found in the workspace afterwards."""
    return encode_list([warning.encode("utf-8", "backslashreplace") for warning in warnings[:MAX_WORDS]])


def read_closing_words(payload: bytes) -> tuple[str, ...]:
    """Read the payload of a frame `W`; what is no list says nothing."""
    try:
        items, _ = decode_list(payload)
    except FrameError:
        return ()
    return tuple(item[:1024].decode("utf-8", "replace") for item in items[:MAX_WORDS])
