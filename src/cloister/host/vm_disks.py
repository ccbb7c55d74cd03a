"""The writable disk that an agent keeps in a project (`/var` of its guests): made once, grown, checked, held by one VM.

The guest writes it, so nothing of it is ever looked at on the host but its superblock; what needs more is done by
e2fsprogs in a jail (`e2fs`). Whoever starts a VM holds the disk by a lock on the very descriptor that the monitor
gets (flock(2)): it lasts as long as the last process that has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import NamedTuple

from cloister.host import e2fs
from cloister.host.e2fs import DiskToolError, Tools
from cloister.host.ext4.format import BrokenImageError
from cloister.host.vm_image import copy_sparse, superblock

_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_BYTES_PER_INODE = 16384
_LEAST_BYTES = 16 << 20


class HeldDisk(NamedTuple):
    """A disk that nobody else writes while `fd` is open somewhere."""

    path: str
    fd: int
    notice: str = ""
    """What the person should know; empty mostly."""
    throwaway: bool = False
    """It is a copy for one run."""

    def close(self) -> None:
        """Let go of it, as far as this process is concerned; a copy loses its name."""
        os.close(self.fd)
        if self.throwaway:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


def hold_var_disk(tools: Tools, path: str, size_bytes: int, *, spare: str) -> HeldDisk:
    """Return the disk at `path`, made where there is none, grown where it is smaller, repaired where it is unclean.

    While another virtual machine holds it, this returns a throwaway copy of it at `spare`. A disk that cannot be
    repaired is set aside as `PATH.broken`, and a new one is made.

    Raises:
        DiskToolError: it cannot be made.
        OSError: there is no room.
    """
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    fd = _lock(path)
    if fd is None:
        return _spare(tools, path, size_bytes, spare)
    try:
        if os.fstat(fd).st_size == 0:
            return HeldDisk(path, make_var_disk(tools, path, size_bytes))
        try:
            notice = _ready(tools, path, fd, size_bytes)
        except (BrokenImageError, DiskToolError) as error:
            os.rename(path, f"{path}.broken")
            notice = f"the agent's disk begins anew: {error.message}; the old one is {path}.broken"
            return HeldDisk(path, make_var_disk(tools, path, size_bytes), notice)
    except BaseException:
        os.close(fd)
        raise
    return HeldDisk(path, fd, notice)


def make_var_disk(tools: Tools, path: str, size_bytes: int) -> int:
    """Make the file `path` an empty file system of so many bytes, and return it open and locked.

    It is sparse, so it takes what is written, and appears under its name when it is whole.

    Raises:
        DiskToolError: it cannot be made.
        OSError: there is no room.
    """
    size = max(size_bytes, _LEAST_BYTES) >> 20 << 20
    partial = f"{path}.partial"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)
    fd = os.open(partial, _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, size)
        e2fs.make(tools, partial, inodes=size // _BYTES_PER_INODE, owner=(0, 0), growing=True)
        os.rename(partial, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(path: str) -> int | None:
    """Open and lock the disk, made empty where there is none; None while another process holds it."""
    while True:
        fd = os.open(path, _OPEN | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.lstat(path)):
                    return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # a new one was put in its place between the two


def _ready(tools: Tools, path: str, fd: int, size_bytes: int) -> str:
    """Repair and grow a disk where it is due; return what the person should know."""
    found = superblock(fd)
    want = max(os.fstat(fd).st_size, size_bytes >> 20 << 20)
    small = found.blocks * found.block_bytes <= want - (1 << 20)
    if found.unclean or small:
        e2fs.repair(tools, path)  # resize2fs wants it to have been checked
    if not small:
        return ""
    try:
        os.ftruncate(fd, want)
        e2fs.grow(tools, path)
    except (DiskToolError, OSError) as error:
        return f"the agent's disk could not be made larger: {error}"
    return ""


def _spare(tools: Tools, path: str, size_bytes: int, spare: str) -> HeldDisk:
    """Make a copy of a disk that another virtual machine is writing; what was under way there is cut off."""
    notice = "another run of this agent has its disk: this one works on a copy, which goes away at its end"
    try:
        copy_sparse(path, spare)
        fd = os.open(spare, _OPEN)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            superblock(fd)
            e2fs.repair(tools, spare)
        except BaseException:
            os.close(fd)
            raise
    except (BrokenImageError, DiskToolError):
        fd = make_var_disk(tools, spare, size_bytes)
        notice = "another run of this agent has its disk, which cannot be copied now: this one begins with an empty one"
    return HeldDisk(spare, fd, notice, throwaway=True)
