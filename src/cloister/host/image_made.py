"""Files that programs of a build have made, taken out of their hands: plain ones only, and by no link.

Scripts of packages may leave anything under any name. Whoever builds has more rights than they, if only to the user's
home, so what is read here is opened below a directory of theirs with every component looked at (`beneath`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
from collections.abc import Iterator

from cloister.errors import StepError
from cloister.host import beneath

_PIECE = 1 << 20


@contextlib.contextmanager
def opened(directory: str, name: str) -> Iterator[io.BufferedReader]:
    """Open a plain file that programs of a build have made, below a directory of theirs.

    Raises:
        StepError: `image-build`: it is not there, or no plain file, or the way to it leads through a link.
    """
    with contextlib.ExitStack() as stack:
        try:
            base = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, base)
            holder, last = stack.enter_context(beneath.parent(base, name))
            file = stack.enter_context(open(os.open(last, beneath.FILE_FLAGS, dir_fd=holder), "rb"))
        except OSError as error:
            raise StepError("image-build", f"{name} was not made: {error.strerror}", where=directory) from error
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise StepError("image-build", f"{name} is no plain file", where=directory)
        yield file


def content(directory: str, name: str, limit: int) -> bytes:
    """Return what is in such a file.

    Raises:
        StepError: as `opened`; it is longer than `limit` bytes.
    """
    with opened(directory, name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise StepError("image-build", f"{name} is longer than {limit >> 20} MiB", where=directory)
    return data


def names(directory: str, name: str) -> list[str]:
    """Return what is in a directory that programs of a build have made; nothing where there is none."""
    try:
        base = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        with beneath.directory(base, name) as found:
            return sorted(os.listdir(found))
    except OSError:
        return []
    finally:
        os.close(base)


def digest(directory: str, name: str) -> str:
    """Return the SHA-256 of such a file, in hex.

    Raises:
        StepError: as `opened`.
    """
    with opened(directory, name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy(directory: str, name: str, target: str) -> str:
    """Copy such a file to a new one of ours, and return the SHA-256 of the copy.

    Raises:
        StepError: as `opened`; then there is no copy.
        OSError: it cannot be written.
    """
    hashed = hashlib.sha256()
    with opened(directory, name) as source, open(target, "xb") as new:
        while data := source.read(_PIECE):
            hashed.update(data)
            new.write(data)
    return hashed.hexdigest()
