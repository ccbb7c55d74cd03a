"""Where a word stands among the events of a chunk: sets of positions, small on disk and quick to intersect.

A set is written as 16-bit numbers while it is small and as a bitmap where that is smaller, after one byte that says
which: the idea of roaring bitmaps (Chambi et al., 2016), with Python's own big integers for the work.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

CHUNK = 1 << 16
"""Most events of a chunk: positions fit into 16 bits."""
_LIST, _BITS = b"l", b"b"
_PLACES = tuple(tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256))


def encode(places: Sequence[int], size: int) -> bytes:
    """Return the bytes for rising positions in a chunk of `size` events."""
    if len(places) * 2 <= size // 8:
        return _LIST + array("H", places).tobytes()
    return _BITS + to_bits(places, size).to_bytes(size // 8 + 1, "little")


def to_bits(places: Iterable[int], size: int) -> int:
    """Return positions as one number, bit by bit."""
    held = bytearray(size // 8 + 1)
    for place in places:
        held[place >> 3] |= 1 << (place & 7)
    return int.from_bytes(held, "little")


def bits(data: bytes, size: int) -> int:
    """Return encoded positions as one number.

    Raises:
        ValueError: these bytes were not made by `encode`.
    """
    if data[:1] == _BITS:
        return int.from_bytes(data[1:], "little")
    if data[:1] != _LIST or len(data) % 2 == 0:
        raise ValueError("no set of positions")
    numbers = array("H")
    numbers.frombytes(data[1:])
    if numbers and max(numbers) >= size:
        raise ValueError("a position outside of its chunk")
    return to_bits(numbers, size)


def positions(held: int) -> list[int]:
    """Return the positions of a number's bits, rising."""
    found: list[int] = []
    for index, byte in enumerate(held.to_bytes((held.bit_length() + 7) // 8, "little")):
        if byte:
            base = index << 3
            found.extend(base + bit for bit in _PLACES[byte])
    return found
