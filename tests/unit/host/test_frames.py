"""Frames and lists as bytes: what is written is read again, and what does not fit is refused."""

from __future__ import annotations

import pytest

from cloister.host import frames


def test_a_frame_is_length_type_payload() -> None:
    """The layout of ARCHITECTURE.md: u32 length, u8 type, payload, little endian."""
    assert frames.encode("F", b"\x07bye") == b"\x04\0\0\0F\x07bye"
    assert frames.encode("K") == b"\0\0\0\0K"


def test_a_list_is_count_then_lengths() -> None:
    """Items may be empty and hold any byte; the offset behind the list is returned."""
    items = [b"", b"a", bytes(range(256))]
    payload = b"xx" + frames.encode_list(items) + b"yy"
    assert frames.decode_list(payload, 2) == (items, len(payload) - 2)


def test_what_does_not_fit_is_refused() -> None:
    """Counts and lengths beyond the payload, and payloads beyond 4 MiB, raise instead of being cut."""
    for payload in (b"", b"\1\0\0", b"\1\0\0\0", b"\1\0\0\0\5\0\0\0abcd", b"\xff\xff\xff\xff\0\0\0\0"):
        with pytest.raises(frames.FrameError):
            frames.decode_list(payload)
    with pytest.raises(frames.FrameError):
        frames.decode_list(bytes(8), -4)
    with pytest.raises(ValueError, match="exceeds"):
        frames.encode("B", bytes(frames.MAX_PAYLOAD + 1))
    assert len(frames.encode("B", bytes(frames.MAX_PAYLOAD))) == frames.MAX_PAYLOAD + 5


@pytest.mark.parametrize("kind", ["", "BB", "\u00e9"])
def test_a_type_is_one_ascii_character(kind: str) -> None:
    """A mistyped frame type is the caller's bug and raises at once."""
    with pytest.raises(ValueError, match="ASCII"):
        frames.encode(kind)
