"""Unpacking what a user's broker sends of the user's home: root writes, so root decides what a file may be.

The tar comes in a sealed memory file (memfd_create(2)), was read with the user's own rights, and holds plain files and
directories (`host/tar_format.py`). Root makes them anew, by descriptor, in an empty directory of its own that only
root can enter: there is no path that anybody else controls, no link to follow and nothing to overwrite. They stay
root's, readable by all, and are mounted read-only.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Self

from cloister.errors import StepError
from cloister.host.tar_format import Entry, TarError, entries

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 20


def unpack(memory: int, directory: int) -> int:
    """Make the files of a sealed tar below an empty directory of root's; return how many entries it had.

    Args:
        memory: the memory file; its offset is not used.
        directory: a descriptor for reading, not `O_PATH`.

    Raises:
        StepError: `carry-refused`: it is not sealed, not a tar of ours or beyond its bounds, names something twice or
            without its parent, or the directory is not empty. What was made until then lies in the directory.
    """
    try:
        size = _checked_size(memory, directory)
        count = 0
        with _Place(directory) as place:
            for entry, offset in entries(lambda at, length: os.pread(memory, length, at), size):
                place.make(entry, memory, offset)
                count += 1
    except TarError as error:
        raise _refused(str(error)) from error
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise _refused(error.strerror or "the system refused it") from error
    return count


def _checked_size(memory: int, directory: int) -> int:
    if fcntl.fcntl(memory, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise TarError("it could still be changed")
    if os.listdir(directory):
        raise TarError("there is something in its place already")
    return os.fstat(memory).st_size


class _Place:
    """The directory that is filled, and the one of its directories that was used last."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._made = {""}
        self._open, self._open_name = os.dup(root), ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._open)

    def make(self, entry: Entry, memory: int, offset: int) -> None:
        above, _, name = entry.name.rpartition("/")
        if above not in self._made:
            raise TarError("an entry comes before its directory")
        self._go_to(above)
        if entry.kind == "directory":
            os.mkdir(name, 0o755, dir_fd=self._open)
            self._made.add(entry.name)
            self._settle(name)
            return
        made = os.open(name, _CREATE, 0o600, dir_fd=self._open)
        try:
            _copy(memory, offset, entry.size, made)
            os.fchmod(made, 0o755 if entry.executable else 0o644)
        finally:
            os.close(made)

    def _go_to(self, above: str) -> None:
        if above == self._open_name:
            return
        current = os.dup(self._root)
        try:
            for part in above.split("/") if above else []:
                following = os.open(part, _DIRECTORY, dir_fd=current)
                os.close(current)
                current = following
        except OSError:
            os.close(current)
            raise
        os.close(self._open)
        self._open, self._open_name = current, above

    def _settle(self, name: str) -> None:
        """Give a directory its mode, whatever the umask is."""
        opened = os.open(name, _DIRECTORY, dir_fd=self._open)
        try:
            os.fchmod(opened, 0o755)
        finally:
            os.close(opened)


def _copy(memory: int, offset: int, size: int, target: int) -> None:
    while size > 0:
        data = os.pread(memory, min(size, _CHUNK), offset)
        if not data:
            raise TarError("it is cut off")
        written = os.write(target, data)
        offset += written
        size -= written


def _refused(why: str) -> StepError:
    return StepError(
        "carry-refused", f"what was to be carried in from the home is refused: {why}",
        remedy="name less in `carry`, or look at what lies there",
    )  # fmt: skip
