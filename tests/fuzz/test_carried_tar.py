"""No bytes make root's reader of tars do anything but read or refuse."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloister.host.tar_format import Entry, TarError, check_name, encode, end, entries, padding

NAMES = st.text(st.characters(blacklist_characters="/\0"), min_size=1, max_size=60).filter(
    lambda name: name not in {".", ".."}
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
GOOD = (
    encode(Entry("d", "directory"))
    + encode(Entry("d/" + "n" * 200, "file", 5, executable=True))
    + b"hello"
    + padding(5)
)


def read(data: bytes) -> list[tuple[Entry, int]]:
    """Read it all."""
    return list(entries(lambda at, length: data[at : at + length], len(data)))


@given(st.binary(max_size=4096))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Nothing else is raised, whatever stands there."""
    for tail in (b"", end()):
        try:
            found = read(data + bytes(-len(data) % 512) + tail)
        except TarError:
            continue
        for entry, _ in found:
            check_name(entry.name)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_one_changed_byte_of_a_header_is_refused_or_means_what_it_says(at: int, value: int) -> None:
    """There is one way to write an entry: what is accepted encodes to the same bytes."""
    data = bytearray(GOOD + end())
    data[at] = value
    try:
        found = read(bytes(data))
    except TarError:
        return
    again = b"".join(encode(entry) + bytes(data[at : at + entry.size]) + padding(entry.size) for entry, at in found)
    assert again + end() == bytes(data)


@given(st.lists(st.tuples(PATHS, st.binary(max_size=600), st.booleans()), max_size=6))
def test_what_is_written_is_read_again(files: list[tuple[str, bytes, bool]]) -> None:
    """Any names and contents survive."""
    written, wanted = b"", []
    for name, data, executable in files:
        try:
            check_name(name)
        except (TarError, UnicodeEncodeError):
            continue
        entry = Entry(name, "file", len(data), executable)
        written += encode(entry) + data + padding(len(data))
        wanted.append((entry, data))
    written += end()
    assert [(entry, written[at : at + entry.size]) for entry, at in read(written)] == wanted
