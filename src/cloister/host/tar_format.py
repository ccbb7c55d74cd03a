"""The tar in which files of a home go to root's daemon: one way to write it, and no other is read.

A subset of ustar (POSIX.1-2017, pax, "ustar Interchange Format") that tar(1) reads: regular files and directories,
parents first, long names as GNU tar has them. No links, devices, owners, times or extensions. Root reads what a user
wrote, so a header counts only where it is byte for byte what `encode` writes of what it says. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

BLOCK = 512
MAX_BYTES = 64 << 20
"""Of all files together."""
MAX_ENTRIES = 20_000
MAX_NAME = 1024
MAX_TAR = MAX_BYTES + MAX_ENTRIES * 5 * BLOCK
"""Bytes of a whole tar: each entry has at most two headers, the blocks of a long name, and padding."""

_SHORT_NAME = 100
_MAX_PART = 255  # NAME_MAX, limits.h
_LONG_NAME = "././@LongLink"
_END = bytes(2 * BLOCK)


class Entry(NamedTuple):
    """One file or directory. `name` is relative, with slashes; `size` is that of a file in bytes."""

    name: str
    kind: Literal["file", "directory"]
    size: int = 0
    executable: bool = False


class TarError(ValueError):
    """Not a tar of ours, or one beyond its bounds."""


def check_name(name: str) -> None:
    """Accept a relative path without empty parts, `.` and `..`.

    Raises:
        TarError: it is none, or too long.
    """
    raw = name.encode("utf-8", "surrogateescape")
    parts = raw.split(b"/")
    if not raw or len(raw) > MAX_NAME or b"\0" in raw or any(part in {b"", b".", b".."} for part in parts):
        raise TarError("a name in it is not a path below the home")
    if any(len(part) > _MAX_PART for part in parts):
        raise TarError("a name in it is too long")


def encode(entry: Entry) -> bytes:
    """Return the headers of one entry; a file's bytes follow, padded by `padding`.

    Raises:
        TarError: the name.
    """
    check_name(entry.name)
    raw = entry.name.encode("utf-8", "surrogateescape")
    header = _header(raw[:_SHORT_NAME], entry)
    if len(raw) <= _SHORT_NAME:
        return header
    named = raw + b"\0"
    return _header(_LONG_NAME.encode(), Entry("", "file", len(named)), b"L") + named + padding(len(named)) + header


def padding(size: int) -> bytes:
    """Return the zeros behind a file of `size` bytes."""
    return bytes(-size % BLOCK)


def end() -> bytes:
    """Return what stands behind the last entry."""
    return _END


def entries(read: Callable[[int, int], bytes], size: int) -> Iterator[tuple[Entry, int]]:
    """Yield each entry of a tar, with the place of its bytes.

    Args:
        read: returns `length` bytes from `offset`: `read(offset, length)`.
        size: bytes of the whole tar.

    Raises:
        TarError: the first thing that is not as `encode` writes it; nothing behind it is read.
    """
    offset, count, total = 0, 0, 0
    if size > MAX_TAR or size % BLOCK:
        raise TarError("it is too large, or cut off")
    while True:
        head = _exactly(read, offset, BLOCK, size)
        if not any(head):
            break
        entry, length = _entry(read, offset, head, size)
        offset += length
        count, total = count + 1, total + entry.size
        if count > MAX_ENTRIES or total > MAX_BYTES:
            raise TarError(f"it holds more than {MAX_ENTRIES} entries or {MAX_BYTES >> 20} MiB")
        if offset + entry.size > size:
            raise TarError("it is cut off")
        filled = padding(entry.size)
        if _exactly(read, offset + entry.size, len(filled), size) != filled:
            raise TarError("an entry is not a plain file or directory")
        yield entry, offset
        offset += entry.size + len(filled)
    if read(offset, size - offset) != _END:
        raise TarError("something stands behind its end")


def _entry(read: Callable[[int, int], bytes], offset: int, head: bytes, size: int) -> tuple[Entry, int]:
    """Return the entry whose headers begin at `offset`, and their length."""
    raw = head[:_SHORT_NAME].rstrip(b"\0")
    if head[156:157] == b"L":
        length = _number(head, 124)
        if length > MAX_NAME + 1:
            raise TarError("a name in it is too long")
        raw = _exactly(read, offset + BLOCK, length, size)[:-1]
        head = _exactly(read, offset + BLOCK + length + len(padding(length)), BLOCK, size)
    kind: Literal["file", "directory"] = "directory" if head[156:157] == b"5" else "file"
    length = _number(head, 124)
    executable = kind == "file" and _number(head, 100, 8) == _MODES[1]
    entry = Entry(raw.decode("utf-8", "surrogateescape"), kind, length, executable)
    wanted = encode(entry)
    if _exactly(read, offset, len(wanted), size) != wanted:
        raise TarError("an entry is not a plain file or directory")
    return entry, len(wanted)


_MODES = (0o644, 0o755)


def _header(name: bytes, entry: Entry, kind: bytes = b"") -> bytes:
    directory = entry.kind == "directory"
    kind = kind or (b"5" if directory else b"0")
    mode = _MODES[directory or entry.executable]
    size = 0 if directory else entry.size
    fields = [name.ljust(_SHORT_NAME, b"\0"), b"%07o\0" % mode, b"%07o\0" % 0, b"%07o\0" % 0, b"%011o\0" % size]
    fields += [b"%011o\0" % 0, b" " * 8, kind, bytes(100), b"ustar\x0000"]
    header = b"".join(fields).ljust(BLOCK, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def _number(head: bytes, at: int, length: int = 12) -> int:
    """Return an octal field; one that is none makes a header that `encode` would not write."""
    digits = head[at : at + length].rstrip(b"\0")
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise TarError("a header in it is not of our making")
    return int(digits, 8)


def _exactly(read: Callable[[int, int], bytes], offset: int, length: int, size: int) -> bytes:
    if offset + length > size:
        raise TarError("it is cut off")
    return read(offset, length)
