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

from cloister.host import e2fs
from cloister.host.e2fs import Tools
from cloister.host.ext4.format import SUPERBLOCK_AT, SUPERBLOCK_BYTES, Superblock, parse_superblock
from cloister.host.sparse import copy_data

SPARE_BYTES = 256 << 20
"""What must stay free on the file system of a copy."""
REPLAYED = ".replayed"
"""Behind the path of a disk: its copy, while it is read."""
FICLONE = 0x40049409  # linux/fs.h
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def clean_disk(tools: Tools, path: str) -> Iterator[int]:
    """Yield a new descriptor of the disk at `path`, or of a replayed copy, which goes after the `with` block.

    Of the disk itself only its superblock is looked at here. The descriptor is the caller's.

    Raises:
        BrokenImageError: it is no file system that can be read.
        DiskToolError: it is unclean, and cannot be replayed.
        OSError: it is not there, or there is no room for a copy.
    """
    opened = os.open(path, _READ)
    try:
        unclean = superblock(opened).unclean
    except BaseException:
        os.close(opened)
        raise
    if not unclean:
        yield opened
        return
    os.close(opened)
    replayed = f"{path}{REPLAYED}"
    try:
        copy_sparse(path, replayed)
        e2fs.repair(tools, replayed)
        yield os.open(replayed, _READ)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(replayed)


def superblock(fd: int) -> Superblock:
    """Return the superblock of an open disk.

    Raises:
        BrokenImageError: it has none.
    """
    return parse_superblock(os.pread(fd, SUPERBLOCK_BYTES, SUPERBLOCK_AT), os.fstat(fd).st_size)


def copy_sparse(path: str, target: str) -> None:
    """Make `target` a private copy of an image; what was there before goes.

    Raises:
        OSError: ENOSPC where it would fill the file system.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    source = os.open(path, _READ)
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
