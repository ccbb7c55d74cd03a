"""Which table a message of the kernel's packet filter is about."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.host.netlink import tables


def message(kind: int, *attributes: tuple[int, bytes]) -> bytes:
    """Return one netlink message of the nf_tables subsystem, as nfnetlink.h has it."""
    body = b"\x01\x00\x00\x00"
    for number, data in attributes:
        body += struct.pack("=HH", 4 + len(data), number) + data + b"\0" * (-len(data) % 4)
    return struct.pack("=IHHII", 16 + len(body), 10 << 8 | kind, 0, 1, 0) + body


def test_the_tables_name_is_found_in_every_message() -> None:
    """Table, chain, rule, set and element messages name their table in the first attribute; several come at once."""
    data = message(2, (1, b"cloister\0")) + message(8, (2, b"output\0"), (1, b"other\0")) + message(14, (1, b"x\0"))

    assert list(tables(data)) == ["cloister", "other", "x"]


def test_the_end_of_a_transaction_is_about_no_table() -> None:
    """What another program does to its own table wakes nobody."""
    assert list(tables(message(15, (1, b"\0\0\0\x07")))) == []


@pytest.mark.parametrize(
    "data", [b"\x01", message(2), message(2, (1, b"cloister\0"))[:-3], struct.pack("=IHHII", 3, 0xA02, 0, 0, 0)]
)
def test_what_cannot_be_read_may_be_about_ours(data: bytes) -> None:
    """A cut message has the empty name, which the watchdog takes for its own table's."""
    assert "" in list(tables(data))


@given(st.binary(max_size=300))
def test_any_bytes_come_to_an_end(data: bytes) -> None:
    """No message loops or fails."""
    assert len(list(tables(data))) <= len(data)
