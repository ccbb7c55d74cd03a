"""Removing a tree that somebody else has made, an agent or a taken-over monitor: however deep, whatever its modes.

`shutil.rmtree` gives up on 1,000 directories within each other, with an error that is none of the file system's, and
on directories without rights; what lies deeper than a path may be long is beyond `os.walk`. Standard library only.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cloister.host import beneath


def sweep(path: str) -> bool:
    """Remove what is at a path, as far as that can be; return whether nothing is left there."""
    with suppress(OSError):
        remove(path)
    return not os.path.lexists(path)


def remove(path: str) -> None:
    """Remove what is at a path. Links are removed, never followed; where something is mounted stays.

    Raises:
        OSError: something could not be removed, or nothing is there.
    """
    holder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            remove_tree(holder, os.path.basename(path))
        else:
            os.unlink(path)
    finally:
        os.close(holder)


def remove_tree(holder: int, name: str) -> None:
    """Remove a directory and what is below it, following no link. Until it is empty it keeps its name.

    Directories below are moved up before they are emptied, so depth costs neither stack nor descriptors.

    Raises:
        OSError: something could not be removed.
    """
    with unlocked(holder, name) as root:
        waiting = _empty(root, root)
        while waiting:
            current = waiting.pop()
            with unlocked(root, current) as opened:
                waiting += _empty(opened, root)
            os.rmdir(current, dir_fd=root)
    os.rmdir(name, dir_fd=holder)


def _empty(opened: int, root: int) -> list[str]:
    """Unlink every file in a directory and move every directory to `root` under a name of ours; return those names."""
    moved: list[str] = []
    for name in os.listdir(opened):
        if beneath.look(opened, name).kind != "directory":
            os.unlink(name, dir_fd=opened)
            continue
        fresh = f".cloister-{secrets.token_hex(8)}"
        with unlocked(opened, name):
            os.rename(name, fresh, src_dir_fd=opened, dst_dir_fd=root)
        moved.append(fresh)
    return moved


@contextmanager
def unlocked(holder: int, name: str) -> Iterator[int]:
    """Open a directory after giving its owner all access; moving a directory needs write access to itself."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=holder)
    try:
        if os.fstat(handle).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(f"/proc/self/fd/{handle}", stat.S_IRWXU)
        opened = beneath.open_directory(handle)
        try:
            yield opened
        finally:
            os.close(opened)
    finally:
        os.close(handle)
