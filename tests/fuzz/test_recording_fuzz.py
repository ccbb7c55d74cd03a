"""The reader of recordings before any bytes: frames, an end that is missing, or one clear error; never another one."""

import contextlib
import io

from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import DeniedError
from cloister.llm.recording import Frame, Sealer, open_frames

KEY, RUN, CALL = bytes(32), "0123456789ab", "A" * 26


def whole() -> bytes:
    """Return a recording of one call."""
    sealer = Sealer(KEY, RUN)
    frames = [sealer.seal("begin", CALL, b"{}"), sealer.seal("request", CALL, b"words"), sealer.close()]
    return sealer.head + b"".join(frames)


WHOLE = whole()
HEAD = len(Sealer(KEY, RUN).head)


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_a_recording_or_one_clear_error(data: bytes, genuine_head: bool) -> None:
    """Bytes alone, or behind a genuine head: nothing opens, and nothing but `DeniedError` comes out."""
    given_bytes = WHOLE[:HEAD] + data if genuine_head else data
    found: list[Frame] = []
    with contextlib.suppress(DeniedError):
        found.extend(open_frames(io.BytesIO(given_bytes).read, KEY, RUN))
    assert found == []


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=30))
def test_bytes_put_in_anywhere_are_noticed(place: int, more: bytes) -> None:
    """A recording with something in its middle never reads as whole."""
    changed = WHOLE[:place] + more + WHOLE[place:]
    try:
        frames = list(open_frames(io.BytesIO(changed).read, KEY, RUN))
    except DeniedError:
        return
    assert all(frame.kind != "close" for frame in frames)
