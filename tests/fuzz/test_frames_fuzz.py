"""Any bytes into the frame codec: a frame, nothing yet, or FrameError; never another error, never a leak."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from cloister.host import frames


@given(st.lists(st.binary(max_size=200), max_size=20), st.binary(max_size=9), st.binary(max_size=9))
def test_lists_survive(items: list[bytes], before: bytes, after: bytes) -> None:
    """What was encoded is decoded to the same, wherever it stands."""
    payload = before + frames.encode_list(items) + after
    assert frames.decode_list(payload, len(before)) == (items, len(payload) - len(after))


@given(st.binary(max_size=400))
def test_any_bytes_as_a_list(payload: bytes) -> None:
    """A hostile list is refused, or it holds no more than was sent."""
    with contextlib.suppress(frames.FrameError):
        items, end = frames.decode_list(payload)
        assert end <= len(payload)
        assert sum(len(item) + 4 for item in items) + 4 == end
