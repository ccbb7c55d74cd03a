"""The sealed form of recordings: what was sealed opens in its own place, and nowhere else."""

from __future__ import annotations

import contextlib
import io
import struct

import pytest

from cloister.errors import DeniedError
from cloister.llm.recording import CHUNK_BYTES, Frame, Kind, Sealer, open_frames

KEY, RUN = bytes(range(32)), "0123456789ab"
ONE, TWO = "A" * 26, "B" * 26
WORDS: list[tuple[Kind, str, bytes]] = [
    ("begin", ONE, b"{}"),
    ("request", ONE, b"the same length 1"),
    ("begin", TWO, b"{}"),
    ("request", TWO, b"the same length 2"),
    ("head", ONE, b"{}"),
    ("answer", ONE, b"the same length 3"),
    ("answer", ONE, b"the same length 4"),
    ("end", ONE, b"{}"),
]


def sealed(run: str = RUN, key: bytes = KEY) -> tuple[bytes, list[bytes]]:
    """Return the head of a file, and its frames."""
    sealer = Sealer(key, run)
    frames = [sealer.seal(kind, call, data, last=kind == "end") for kind, call, data in WORDS]
    return sealer.head, [*frames, sealer.close()]


def opened(data: bytes, run: str = RUN, key: bytes = KEY) -> list[Frame]:
    """Return the frames of a file."""
    return list(open_frames(io.BytesIO(data).read, key, run))


def test_what_was_sealed_opens() -> None:
    """The positive twin: every frame comes back in order, with its call, its number and its mark of the last."""
    head, frames = sealed()
    found = opened(head + b"".join(frames))

    assert [(frame.kind, frame.call, frame.data) for frame in found[:-1]] == WORDS
    assert [frame.number for frame in found if frame.kind == "answer"] == [0, 1]
    assert [frame.last for frame in found] == [False] * 7 + [True, True]
    assert found[-1].kind == "close"


def test_nothing_of_it_can_be_read() -> None:
    """Neither words nor the key stand in the file; the same words look different in every place and file."""
    head, frames = sealed()
    other, more = sealed()
    everything = head + b"".join(frames)

    assert b"length" not in everything
    assert KEY not in everything
    assert head != other
    assert set(frames).isdisjoint(more)


@pytest.mark.parametrize("place", range(9))
def test_every_changed_byte_is_noticed(place: int) -> None:
    """In each frame, each byte that is flipped ends the reading there, without an end; what came before is genuine.

    A length that points behind the end of the file looks like a file that was cut, which is told as well.
    """
    head, frames = sealed()
    for index in range(len(frames[place])):
        changed = bytearray(frames[place])
        changed[index] ^= 1
        found: list[Frame] = []
        data = io.BytesIO(head + b"".join([*frames[:place], bytes(changed), *frames[place + 1 :]]))
        if index < 4:  # the length
            with contextlib.suppress(DeniedError):
                found.extend(open_frames(data.read, KEY, RUN))
        else:
            with pytest.raises(DeniedError, match="was changed"):
                found.extend(open_frames(data.read, KEY, RUN))
        assert [frame.data for frame in found] == [words[2] for words in WORDS][:place]
        assert all(frame.kind != "close" for frame in found)


def test_every_changed_byte_of_the_head_is_noticed() -> None:
    """Name, nonce and wrapped key belong together."""
    head, frames = sealed()
    for index in range(len(head)):
        changed = bytearray(head)
        changed[index] ^= 1
        with pytest.raises(DeniedError):
            opened(bytes(changed) + b"".join(frames))


@pytest.mark.parametrize(
    "order",
    [
        pytest.param([0, 1, 2, 3, 4, 6, 5, 7, 8], id="two of one answer swapped"),
        pytest.param([0, 3, 2, 1, 4, 5, 6, 7, 8], id="the requests of two calls swapped"),
        pytest.param([0, 1, 2, 3, 4, 6, 7, 8], id="one left out"),
        pytest.param([0, 1, 2, 3, 4, 5, 5, 6, 7, 8], id="one twice"),
        pytest.param([0, 1, 2, 3, 4, 5, 8], id="the end moved up"),
        pytest.param([0, 1, 2, 3, 4, 5, 6, 7, 8, 8], id="more behind the end"),
        pytest.param([1, 2, 3, 4, 5, 6, 7, 8], id="the beginning left out"),
    ],
)
def test_frames_open_in_their_own_place_only(order: list[int]) -> None:
    """Reordered, left out, repeated or mixed: all of it is noticed."""
    head, frames = sealed()
    with pytest.raises(DeniedError, match="was changed"):
        opened(head + b"".join(frames[index] for index in order))


def test_a_frame_cannot_be_given_another_name() -> None:
    """Kind, call, number and the mark of the last are bound, though they stand in clear."""
    head, frames = sealed()
    for kind, flag, call, number in ((b"Q", b"0", ONE, 0), (b"A", b"1", ONE, 0), (b"A", b"0", TWO, 0),
                                     (b"A", b"0", ONE, 1)):  # fmt: skip
        box = frames[5][36:]
        renamed = struct.pack(">Icc26sI", len(box), kind, flag, call.encode(), number) + box
        with pytest.raises(DeniedError):
            opened(head + b"".join([*frames[:5], renamed, *frames[6:]]))


def test_another_files_frames_do_not_open() -> None:
    """Neither another run's file nor frames of one, nor a head over another file's frames."""
    head, frames = sealed()
    other, more = sealed("ba9876543210")
    again, _ = sealed()
    for data in (other + b"".join(more), head + b"".join(more), again + b"".join(frames)):
        with pytest.raises(DeniedError):
            opened(data)


def test_another_users_key_opens_nothing() -> None:
    """A wrong key is one clear error."""
    head, frames = sealed()
    with pytest.raises(DeniedError) as raised:
        opened(head + b"".join(frames), key=bytes(32))
    assert raised.value.reference == "recording-key-wrong"


def test_what_is_cut_off_has_no_end() -> None:
    """Cut anywhere, complete frames open and the closing one is missing: never an error, never an end."""
    head, frames = sealed()
    data = b"".join(frames)
    for length in range(len(data)):
        found = opened(head + data[:length])
        assert [frame.data for frame in found] == [words[2] for words in WORDS][: len(found)]
        assert all(frame.kind != "close" for frame in found)


def test_a_cut_head_is_an_error() -> None:
    """A file that does not even say what it is opens as nothing."""
    head, _ = sealed()
    for length in range(len(head)):
        with pytest.raises(DeniedError):
            opened(head[:length])


def test_a_frame_is_bounded() -> None:
    """A reader never takes in more than a chunk, whatever a length claims; a writer cannot make a larger one."""
    head, frames = sealed()
    asked: list[int] = []
    huge = io.BytesIO(head + struct.pack(">I", 0xFFFF_FFFF) + frames[0][4:])

    def read(count: int) -> bytes:
        asked.append(count)
        return huge.read(count)

    with pytest.raises(DeniedError):
        list(open_frames(read, KEY, RUN))
    assert max(asked) < 100
    with pytest.raises(ValueError, match="at most one chunk"):
        Sealer(KEY, RUN).seal("answer", ONE, bytes(CHUNK_BYTES + 1))
