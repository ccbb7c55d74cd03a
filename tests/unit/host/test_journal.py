"""The journal: what was appended is read again, and nothing else, whatever happened to the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import RetryError
from cloister.host import journal
from cloister.host.journal import Journal, Record, frame, parse

records = st.lists(st.builds(Record, st.integers(1, 255), st.binary(max_size=60)), max_size=8)


def _appended(directory: Path, *payloads: bytes) -> None:
    writer = Journal(str(directory))
    for payload in payloads:
        writer.append(1, payload).pins += 1
    writer.close()


def test_what_was_appended_is_read_in_order(tmp_path: Path) -> None:
    """A later process reads the records of all earlier ones, the oldest first."""
    _appended(tmp_path, b"one", b"two")
    _appended(tmp_path, b"three")

    assert [record.payload for record in journal.read(str(tmp_path)).records] == [b"one", b"two", b"three"]


@given(records)
def test_a_segment_torn_at_any_byte_keeps_every_whole_record(all_of_them: list[Record]) -> None:
    """Cut off anywhere, a segment gives the records before the cut, and counts the rest as damage."""
    data = b"".join(frame(*record) for record in all_of_them)
    for cut in range(len(data) + 1):
        reading = parse(data[:cut])
        whole = len(reading.records)
        assert reading.records == all_of_them[:whole]
        assert sum(len(frame(*record)) for record in reading.records) + reading.damaged == cut
        assert whole == len(all_of_them) or cut < sum(len(frame(*record)) for record in all_of_them[: whole + 1])


@given(st.binary(max_size=300))
def test_no_bytes_are_a_record_by_accident(data: bytes) -> None:
    """Any bytes can be read; they count as damage or are whole records, never an error."""
    reading = parse(data)
    assert sum(len(frame(*record)) for record in reading.records) + reading.damaged == len(data)


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=2, max_size=6), st.data())
def test_a_flipped_bit_costs_one_record(payloads: list[bytes], data: st.DataObject) -> None:
    """Damage in the middle takes its own record away and leaves those before and after it."""
    frames = [frame(1, payload) for payload in payloads]
    hit = data.draw(st.integers(0, len(frames) - 1))
    place = data.draw(st.integers(0, len(frames[hit]) - 1))
    damaged = bytearray(frames[hit])
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))

    reading = parse(b"".join([*frames[:hit], bytes(damaged), *frames[hit + 1 :]]))

    left = [payload for number, payload in enumerate(payloads) if number != hit]
    assert [record.payload for record in reading.records] == left
    assert reading.damaged == len(frames[hit])


def test_zeros_after_a_power_cut_are_no_records() -> None:
    """A file that the file system filled with zeros gives what stands before them."""
    reading = parse(frame(1, b"kept") + bytes(5000) + frame(2, b"after"))

    assert [record.payload for record in reading.records] == [b"kept", b"after"]
    assert reading.damaged == 5000


def test_a_second_writer_is_refused_and_a_later_one_is_not(tmp_path: Path) -> None:
    """Only one process writes; the error says so, and the lock goes with its holder."""
    first = Journal(str(tmp_path))
    with pytest.raises(RetryError) as caught:
        Journal(str(tmp_path))
    assert caught.value.reference == "ledger-in-use"
    first.close()

    Journal(str(tmp_path)).close()


def test_segments_go_when_nobody_needs_them(tmp_path: Path) -> None:
    """A pinned segment survives rotation and the end; one without pins is deleted, in any order."""
    writer = Journal(str(tmp_path), segment_bytes=64)
    held = [writer.append(1, b"x" * 60) for _ in range(4)]
    for segment in held:
        segment.pins += 1
    assert len({segment.path for segment in held}) == 4

    held[1].pins -= 1
    writer.delete(writer.sweep())
    assert [os.path.exists(segment.path) for segment in held] == [True, False, True, True]

    for segment in held:
        segment.pins = 0
    writer.close()
    assert journal.segments(str(tmp_path)) == []


def test_an_unneeded_active_segment_is_used_again_from_its_beginning(tmp_path: Path) -> None:
    """A journal whose rows are all in the ledger does not grow."""
    writer = Journal(str(tmp_path), segment_bytes=1000)
    for _ in range(50):
        writer.append(1, b"x" * 300)
        writer.delete(writer.sweep())
    assert writer.size() <= 1000
    writer.append(1, b"last").pins += 1
    writer.close()

    assert journal.read(str(tmp_path)).records[-1] == Record(1, b"last")


def test_half_a_record_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk takes half a record, the append fails and the half is cut off; the next one is read."""
    writer = Journal(str(tmp_path))
    writer.append(1, b"before").pins += 1
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the number is looked at
        writer.append(1, b"too much")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    writer.append(1, b"after").pins += 1
    writer.close()

    reading = journal.read(str(tmp_path))
    assert [record.payload for record in reading.records] == [b"before", b"after"]
    assert reading.damaged == 0


def test_half_a_record_that_cannot_be_cut_off_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even cutting fails, a new segment begins, and the records on both sides are read."""
    writer = Journal(str(tmp_path))
    writer.append(1, b"before").pins += 1
    real = os.write

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:9]))
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OSError):  # noqa: PT011
        writer.append(1, b"too much")
    monkeypatch.undo()
    writer.append(1, b"after").pins += 1
    writer.close()

    reading = journal.read(str(tmp_path))
    assert [record.payload for record in reading.records] == [b"before", b"after"]
    assert reading.damaged == 9


def test_a_record_that_is_too_long_is_refused(tmp_path: Path) -> None:
    """A length beyond the limit would read as damage, so it is never written."""
    writer = Journal(str(tmp_path))
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the number is looked at
        writer.append(1, bytes(journal.MAX_PAYLOAD + 1))
    assert caught.value.errno == errno.EMSGSIZE
    writer.append(1, bytes(journal.MAX_PAYLOAD)).pins += 1
    writer.close()

    assert len(journal.read(str(tmp_path)).records) == 1


def test_sync_covers_every_segment_and_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was appended before a sync is asked of the disk: each segment since the last one, and their directory."""
    synced: list[str] = []

    def remember(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fdatasync", remember)
    monkeypatch.setattr(os, "fsync", remember)
    writer = Journal(str(tmp_path), segment_bytes=64)
    for _ in range(3):
        writer.append(1, b"x" * 60).pins += 1
    writer.sync()
    assert set(synced) == {*(f"journal-000000000{number}.log" for number in (1, 2, 3)), tmp_path.name}

    synced.clear()
    writer.sync()
    assert synced == [], "nothing was appended since"
    writer.append(1, b"x")
    writer.sync()
    assert "journal-0000000004.log" in synced
    writer.close()


def test_files_are_the_owners_alone(tmp_path: Path) -> None:
    """Nobody else reads which models a person used."""
    writer = Journal(str(tmp_path / "books"))
    path = writer.append(1, b"x").path

    assert os.stat(tmp_path / "books").st_mode & 0o777 == 0o700
    assert os.stat(path).st_mode & 0o777 == 0o600
    writer.close()


def test_a_link_in_place_of_a_segment_is_not_followed(tmp_path: Path) -> None:
    """A symbolic link under the name of the next segment is an error, not a file somewhere else."""
    writer = Journal(str(tmp_path))
    (tmp_path / "journal-0000000001.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):  # noqa: PT011
        writer.append(1, b"x")
    assert not (tmp_path / "elsewhere").exists()
    writer.close()
