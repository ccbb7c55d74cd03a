"""Any byte of a log changed, removed or put in is found; any bytes at all are judged without a crash."""

from hypothesis import given, settings
from hypothesis import strategies as st

from support.audit_memory import MemoryLog, look, small_log

LOG = small_log()
FILES = [(first, b"".join(line + b"\n" for line in lines)) for first, lines in LOG.segments]
SIZE = sum(len(data) for _, data in FILES)


def judged(files: list[tuple[int, bytes]], log: MemoryLog = LOG) -> bool:
    """Return whether these files verify."""
    return look(log, [(first, data.split(b"\n")[:-1]) for first, data in files]).good and all(
        data.endswith(b"\n") for _, data in files
    )


def damaged(place: int, change: bytes, *, length: int) -> list[tuple[int, bytes]]:
    """Return the files with bytes at a place of the whole log replaced."""
    files = []
    for first, data in FILES:
        if 0 <= place < len(data):
            files.append((first, data[:place] + change + data[place + length :]))
        else:
            files.append((first, data))
        place -= len(data)
    return files


@settings(max_examples=400, deadline=None)
@given(st.integers(0, SIZE - 1), st.integers(1, 255))
def test_every_changed_byte_is_found(place: int, difference: int) -> None:
    """One byte, anywhere, to any other value; the same log untouched is good."""
    data = b"".join(data for _, data in FILES)
    assert not judged(damaged(place, bytes([data[place] ^ difference]), length=1))
    assert judged(FILES)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, SIZE - 1), st.integers(0, 900), st.binary(max_size=40))
def test_bytes_cut_out_or_put_in_are_found(place: int, length: int, put: bytes) -> None:
    """Any stretch replaced by any bytes, unless that changes nothing."""
    files = damaged(place, put, length=length)
    assert judged(files) == (files == FILES)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.lists(st.binary(max_size=200), max_size=6)), max_size=4))
def test_any_bytes_are_judged(segments: list[tuple[int, list[bytes]]]) -> None:
    """What is no log is said to be none."""
    assert not look(LOG, segments, noted={}).good


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(28)), st.sets(st.integers(0, 27), max_size=8))
def test_any_order_of_any_lines_is_found(order: list[int], left_out: set[int]) -> None:
    """Lines of a true log in any other order, with any of them missing, are no true log."""
    lines = [line for _, block in LOG.segments for line in block]
    kept = [lines[number] for number in order if number not in left_out]
    assert look(LOG, [(1, kept)]).good == (kept == lines)
