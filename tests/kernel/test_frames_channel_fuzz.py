"""Any bytes on a real channel: a frame, or a refusal, and no descriptor kept. Needs sockets, so it stands here."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cloister.host import frames


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.integers(0, 3)), max_size=12))
def test_any_bytes_on_a_channel(pieces: list[tuple[bytes, int]]) -> None:
    """A hostile peer with descriptors in hand gets FrameError at worst; every descriptor is handed on or closed."""
    count = len(list(Path("/proc/self/fd").iterdir()))
    ours, theirs = socket.socketpair()
    channel = frames.Channel(ours)
    with contextlib.suppress(frames.FrameError):
        for data, descriptors in pieces:
            socket.send_fds(theirs, [data], [theirs.fileno()] * descriptors)
            while frame := channel.receive():
                for descriptor in frame.descriptors:
                    os.close(descriptor)
    channel.close()
    theirs.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == count
