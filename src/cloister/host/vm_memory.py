"""A guest's memory as a file: mostly empty, hashed without what is empty, and handed out so that nobody can change it.

A memory backend of QEMU 7.2 wants to open its file for writing, also where the guest's writes stay private to it. So a
monitor never gets the file itself, but a sealed copy (memfd_create(2), F_SEAL_WRITE): shared by all who start from
it, copied on write by the kernel, and the copy is what was hashed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator

PIECE = 64 << 10
PAGE = 4096
_NO_PIECE = bytes(PIECE)
_NO_PAGE = bytes(PAGE)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def new(name: str, size: int) -> int:
    """Return a file of zeroes in memory, of `size` bytes, that can be sealed.

    Raises:
        OSError: the kernel has no room.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def seal(descriptor: int) -> None:
    """Let nobody change a file in memory any more, not even through a descriptor that is open already.

    Raises:
        OSError: somebody has it mapped for writing.
    """
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)


def sealed(path: str, digest: str, size: int) -> int:
    """Return a sealed copy of a file, whose digest is that of the copy.

    Raises:
        OSError: it cannot be read, or has another content.
    """
    source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(source).st_size != size:
            raise OSError(0, "a file has another size")
        target = new(os.path.basename(path), size)
        try:
            found, _ = copy(source, target, size)
            if found != digest:
                raise OSError(0, "a file has another content")  # noqa: TRY301  # its copy goes as well
            seal(target)
        except OSError:
            os.close(target)
            raise
    finally:
        os.close(source)
    return target


def copy(source: int, target: int, size: int) -> tuple[str, int]:
    """Copy what is not empty, page by page; return the digest, and how many bytes that was.

    Args:
        source: an open file of `size` bytes.
        target: an open file of zeroes, as long.
        size: in bytes.

    Raises:
        OSError: one of them cannot be read or written.
    """
    hashed, stored = hashlib.sha256(), 0
    for at, data in _pieces(source, size):
        hashed.update(at.to_bytes(8, "little"))
        hashed.update(data)
        stored += _write(target, data, at)
    return hashed.hexdigest(), stored


def digest(source: int, size: int) -> str:
    """Return the digest that `copy` would.

    Raises:
        OSError: it cannot be read.
    """
    hashed = hashlib.sha256()
    for at, data in _pieces(source, size):
        hashed.update(at.to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()


def _pieces(source: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the pieces that are not empty, with their places."""
    at = 0
    while at < size:
        try:
            found = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # nothing but a hole up to the end
            raise
        at = found // PIECE * PIECE
        end = os.lseek(source, found, os.SEEK_HOLE)
        while at < min(end, size):
            data = os.pread(source, min(PIECE, size - at), at)
            if len(data) < min(PIECE, size - at):
                raise OSError(errno.EIO, "the file became shorter")
            if data != _NO_PIECE[: len(data)]:
                yield at, data
            at += PIECE


def _write(target: int, data: bytes, at: int) -> int:
    """Write the pages that are not empty; return their bytes."""
    written = begin = 0
    view = memoryview(data)
    for place in range(0, len(data) + PAGE, PAGE):
        page = view[place : place + PAGE]
        if page and page != _NO_PAGE[: len(page)]:
            continue
        if place > begin:
            piece = view[begin:place]
            os.pwrite(target, piece, at + begin)
            written += len(piece)
        begin = place + PAGE
    return written
