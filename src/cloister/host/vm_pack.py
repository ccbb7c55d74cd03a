"""A file or a directory of a guest's image as a tar, for whoever takes it out (`vm_copy`). Done in a confined child.

Its one top-level entry has the last part of the name. Links, devices and the like are told of and carry nothing; holes
are zeros, so whoever reads bounds how much he takes.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator

from cloister.errors import UsageError
from cloister.host.ext4 import tree
from cloister.host.ext4.format import Inode
from cloister.host.ext4.image import Image

_BLOCK = 512
_ZEROS = bytes(1 << 20)
_PERMISSIONS = 0o777


class Pack:
    """One tar under way."""

    def __init__(self, image: Image, sink: int, tell: Callable[[int, int], None]) -> None:
        """Write to the descriptor `sink`; `tell` is called with how many entries were written."""
        self._image, self._sink, self._tell = image, sink, tell
        self._count = 0

    def send(self, name: bytes) -> int:
        """Write what is at the path `name`; return how many entries that were.

        Raises:
            UsageError: nothing is, or a link leads on from there.
            BrokenImageError: the image is not what it says.
            OSError: nobody reads it any more.
        """
        top = tree.find(self._image, name)
        last = name.rstrip(b"/").rpartition(b"/")[2]
        if top is None or not last or not (top.is_file or top.is_directory):
            raise UsageError(
                "vm-file", "there is no such file or directory on the disk; links are not followed",
                where=os.fsdecode(name),
            )  # fmt: skip
        self._entry(last, top)
        if top.is_directory:
            for path, inode in tree.walk(self._image, top):
                self._entry(last + b"/" + path, inode)
        self._write(bytes(2 * _BLOCK))
        return self._count

    def _entry(self, name: bytes, inode: Inode) -> None:
        self._count += 1
        self._tell(self._count, 0)
        head = tarfile.TarInfo(os.fsdecode(name))
        head.mode = inode.mode & _PERMISSIONS
        head.mtime = max(0, inode.mtime_ns // 1_000_000_000)
        if inode.is_directory:
            head.type = tarfile.DIRTYPE
        elif inode.is_file:
            head.size = inode.size
        else:
            head.type = tarfile.SYMTYPE if inode.is_link else tarfile.FIFOTYPE
        self._write(head.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        if inode.is_file:
            for part in self._content(inode):
                self._tell(self._count, 0)
                self._write(part)
            self._write(bytes(-inode.size % _BLOCK))

    def _content(self, inode: Inode) -> Iterator[bytes | memoryview]:
        """Yield exactly as many bytes as the header has said."""
        at = 0
        for start, data in tree.contents(self._image, inode):
            yield from _hole(start - at)
            yield data
            at = start + len(data)
        yield from _hole(inode.size - at)

    def _write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._sink, left) :]


def _hole(length: int) -> Iterator[memoryview]:
    while length > 0:
        yield memoryview(_ZEROS)[:length]
        length -= len(_ZEROS)
