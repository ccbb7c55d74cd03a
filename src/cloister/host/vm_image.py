"""A disk of a stopped microVM, opened for reading; an unclean one is replayed first, on a private copy, in a jail.

What a guest left half done stands in the journal. e2fsck puts it into its place, on a copy that goes away again, so
that the disk stays as the guest left it. The copy takes no more than the disk does (reflink where the file system has
it).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from cloister.errors import UsageError
from cloister.host import e2fs
from cloister.host.e2fs import Tools
from cloister.host.ext4 import tree
from cloister.host.ext4.image import Image
from cloister.host.sparse import copy_data

SPARE_BYTES = 256 << 20
"""What must stay free on the file system of a copy."""
FICLONE = 0x40049409  # linux/fs.h
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def open_clean(tools: Tools, path: str) -> Iterator[Image]:
    """Open the disk at `path` for the time of a `with` block.

    Raises:
        BrokenImageError: it is no file system that can be read.
        DiskToolError: it is unclean, and cannot be replayed.
        OSError: it is not there, or there is no room for a copy.
    """
    with Image(path) as image:
        if not image.super.unclean:
            yield image
            return
    replayed = f"{path}.replayed"
    try:
        copy_sparse(path, replayed)
        e2fs.repair(tools, replayed)
        with Image(replayed) as image:
            yield image
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(replayed)


def copy_sparse(path: str, target: str) -> None:
    """Make `target` a private copy of an image; what was there before goes.

    Raises:
        OSError: ENOSPC where it would fill the file system.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        made = os.open(target, _NEW, 0o600)
        try:
            with contextlib.suppress(OSError):
                fcntl.ioctl(made, FICLONE, source)
                return
            status, free = os.fstat(source), os.fstatvfs(made)
            if status.st_blocks * 512 + SPARE_BYTES > free.f_bavail * free.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
            copy_data(source, made, status.st_size)
        finally:
            os.close(made)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        raise
    finally:
        os.close(source)


def read_file(tools: Tools, path: str, name: bytes) -> Iterator[bytes]:
    """Yield the bytes of the regular file `name` on the disk at `path`, holes as zeros, at most 1 MiB at once.

    Raises:
        UsageError: there is no such file; links on the way are not followed.
        BrokenImageError: the disk cannot be read.
    """
    with open_clean(tools, path) as image:
        inode = tree.find(image, name)
        if inode is None or not inode.is_file:
            raise UsageError("vm-file", "there is no such regular file on the disk", where=os.fsdecode(name))
        at = 0
        for start, data in tree.contents(image, inode):
            while at < start:
                hole = min(start - at, 1 << 20)
                yield bytes(hole)
                at += hole
            yield data
            at += len(data)
        while at < inode.size:
            hole = min(inode.size - at, 1 << 20)
            yield bytes(hole)
            at += hole
