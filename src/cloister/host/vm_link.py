"""The link's first two frames, for makers of templates: a host says `J`, a guest that is up says `H`.

The whole link is the keeper's (`shim/keeper.c`; ARCHITECTURE.md, "The link").
"""

from __future__ import annotations

import os
import select
import socket
import time

from cloister.errors import StepError
from cloister.host.frames import Channel, Frame, FrameError, decode_list, decode_u32, encode_u32

PROTOCOL = 2
"""Of the link between keeper and guest (`shim/link.h`); an image's manifest names the one that its guest speaks."""
_NONCE = 16
_MOST_WORDS = 64


def greet(channel: Channel, nonce: bytes) -> None:
    """Say `J`: from now on the guest speaks to us."""
    channel.send("J", encode_u32(PROTOCOL) + nonce)


def hello(channel: Channel, nonce: bytes, *, timeout_s: float) -> tuple[str, ...]:
    """Wait for the guest's `H`; return its words.

    Raises:
        StepError: the guest is silent, or says something else.
    """
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    try:
        while True:
            frame = channel.receive()
            if frame:
                return _words(frame, nonce)
            left = deadline - time.monotonic()
            if left <= 0:
                raise _silent(f"it said nothing for {timeout_s:g} s")
            poll.poll(left * 1000)
    except FrameError as error:
        raise _silent(str(error)) from None


def new_nonce() -> bytes:
    """Return what ties a guest's answer to this question."""
    return os.urandom(_NONCE)


def pair() -> tuple[Channel, int]:
    """Return our end of a channel, and the descriptor for the monitor."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours), theirs.detach()


def _words(frame: Frame, nonce: bytes) -> tuple[str, ...]:
    protocol, offset = decode_u32(frame.payload)
    if frame.kind != "H" or frame.payload[offset : offset + _NONCE] != nonce:
        raise _silent("it does not answer as a guest does")
    if protocol != PROTOCOL:
        raise _silent(f"it speaks version {protocol} of the link, and this is {PROTOCOL}")
    words, _ = decode_list(frame.payload, offset + _NONCE)
    return tuple(word.decode("utf-8", "replace")[:256] for word in words[:_MOST_WORDS])


def _silent(why: str) -> StepError:
    return StepError("guest-silent", f"the guest did not come up: {why}", remedy="cloister doctor")
