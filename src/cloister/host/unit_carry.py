"""Unpacking what a user carries into a run: a tar in a sealed memory file, written below a directory of root's.

The tar comes from the user's own process, so nothing in it is believed: regular files and directories only, plain
relative names, bounded in number and size. Everything is written by descriptor into a directory that nobody else
can reach, owned by root, readable by all: the agent sees it read-only. What is carried is for others to say.
"""

from __future__ import annotations

import os
import tarfile

from cloister.errors import UsageError
from cloister.host.unit_syscalls import PATH_ONLY, open_below

LARGEST = 64 << 20
"""Bytes of all files together, and of the archive."""
MOST = 20_000
_LONGEST_NAME = 1024
_DEEPEST = 32
_CHUNK = 1 << 20


def unpack(archive: int, directory: int) -> int:
    """Unpack the tar in the memory file `archive` below `directory`, which is empty; return the number of entries.

    Raises:
        UsageError: it is no tar, has something else than plain files and directories, or is too large.
    """
    if os.fstat(archive).st_size > LARGEST:
        raise _refused("what is carried in is too large", str(os.fstat(archive).st_size))
    count = size = 0
    before = os.umask(0)
    try:
        with os.fdopen(os.dup(archive), "rb") as file:
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
                for entry in tar:
                    count, size = count + 1, size + max(entry.size, 0)
                    if count > MOST or size > LARGEST:
                        raise _refused("what is carried in is too large", entry.name[:200])
                    _write(tar, entry, directory)
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise _refused(f"what is carried in is no archive: {error}", "") from error
    except OSError as error:
        raise _refused(f"what is carried in cannot be unpacked: {error.strerror}", str(error.filename or "")) from error
    finally:
        os.umask(before)
    return count


def _write(tar: tarfile.TarFile, entry: tarfile.TarInfo, directory: int) -> None:
    parts = entry.name.split("/")
    plain = all(part not in {"", ".", ".."} for part in parts) and "\0" not in entry.name
    if not plain or len(entry.name) > _LONGEST_NAME or len(parts) > _DEEPEST:
        raise _refused("a carried file has a name that leads elsewhere", entry.name[:200])
    if not (entry.isreg() or entry.isdir()) or entry.issparse():
        raise _refused("only files and directories are carried in", entry.name[:200])
    holder = _holder(directory, parts[:-1])
    try:
        if entry.isdir():
            _make(holder, parts[-1])
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        made = os.open(parts[-1], flags, 0o755 if entry.mode & 0o100 else 0o644, dir_fd=holder)
        source = tar.extractfile(entry)
        with os.fdopen(made, "wb") as target:
            left = entry.size
            while source is not None and left > 0:
                part = source.read(min(_CHUNK, left))
                if not part:
                    raise _refused("what is carried in ends too early", entry.name[:200])
                target.write(part)
                left -= len(part)
    finally:
        os.close(holder)


def _holder(directory: int, parts: list[str]) -> int:
    """Open the directory an entry goes into, making what is missing."""
    holder = open_below(directory, "", PATH_ONLY | os.O_DIRECTORY)
    for part in parts:
        try:
            _make(holder, part)
            below = open_below(holder, part, PATH_ONLY | os.O_DIRECTORY)
        finally:
            os.close(holder)
        holder = below
    return holder


def _make(holder: int, name: str) -> None:
    try:
        os.mkdir(name, 0o755, dir_fd=holder)
    except FileExistsError:
        os.close(open_below(holder, name, PATH_ONLY | os.O_DIRECTORY))


def _refused(message: str, where: str) -> UsageError:
    return UsageError("carried-refused", message, where=where)
