"""Parts of ext4 as bytes, the way `fill` writes them: blocks of directories, times; and bits of its bitmaps. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cloister.host.ext4.format import NANOSECONDS

BLOCK = 4096
KINDS = {"file": 1, "directory": 2, "socket": 6, "symlink": 7}


class Name(NamedTuple):
    """One entry of a directory to be written."""

    name: bytes
    inode: int
    kind: str


def directory_blocks(number: int, parent: int, names: Iterable[Name]) -> Iterator[bytes]:
    """Yield the blocks of a directory: entries side by side, the last of each block taking the rest of it."""
    block: list[bytes] = []
    used = 0
    last = (b"", 0)
    for one in (Name(b".", number, "directory"), Name(b"..", parent, "directory"), *names):
        length = (8 + len(one.name) + 3) & ~3
        if used + length > BLOCK:
            block[-1] = _dirent(last, BLOCK - used + len(block[-1]))
            yield b"".join(block)
            block, used = [], 0
        last = (one.name, one.inode | KINDS[one.kind] << 32)
        block.append(_dirent(last, length))
        used += length
    block[-1] = _dirent(last, BLOCK - used + len(block[-1]))
    yield b"".join(block)


def _dirent(what: tuple[bytes, int], length: int) -> bytes:
    name, packed = what
    return struct.pack("<IHBB", packed & 0xFFFFFFFF, length, len(name), packed >> 32).ljust(8, b"\0") + name.ljust(
        length - 8, b"\0"
    )


def time_words(nanoseconds: int) -> tuple[int, int]:
    """Return seconds and the word of their upper bits and nanoseconds, within what ext4 can say (1901 to 2446)."""
    seconds, rest = divmod(nanoseconds, NANOSECONDS)
    seconds = min(max(seconds, -(1 << 31)), (1 << 34) - (1 << 31) - 1)
    low = seconds & 0xFFFFFFFF
    signed = low - (1 << 32) if low & 0x80000000 else low
    return low, (seconds - signed) >> 32 & 3 | rest << 2


def trailing_ones(bits: int) -> int:
    """Return how many of the lowest bits are set in a row."""
    return (~bits & (bits + 1)).bit_length() - 1


def trailing_zeros(bits: int, most: int) -> int:
    """Return how many of the lowest bits are clear in a row; `most` where none is set."""
    return (bits & -bits).bit_length() - 1 if bits else most
