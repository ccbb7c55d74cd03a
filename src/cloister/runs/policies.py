"""The policy files of one user, read again when they change: what `run`, `plan`, `check` and `explain` share.

A file counts only when nobody else can write it: owned by the user or root, not writable by
group or others, no symlink in place of the file. A broken file is an error at the next start,
never the old value and never a default; running sandboxes keep the policy they started with
until a good one is there.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import NamedTuple

from cloister.errors import PolicyError, Problem

MAX_BYTES = 1 << 20


class Source(NamedTuple):
    """The text of one policy file."""

    path: str
    text: bytes


def read_trusted(path: str, uid: int) -> Source | None:
    """Return a policy file's content, or None when there is no such file.

    Raises:
        PolicyError: it is there but cannot be trusted or read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refuse(path, f"cannot be read: {error.strerror}", "") from error
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise _refuse(path, "is not a regular file", "")
        if info.st_uid not in (uid, 0):
            raise _refuse(path, "belongs to another user", f"chown {uid} {path}")
        if info.st_mode & 0o022:
            raise _refuse(path, "can be written by others", f"chmod go-w {path}")
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise _refuse(path, "is larger than 1 MiB", "")
    return Source(path, text)


def stamp(path: str) -> tuple[int, int, int]:
    """Return what changes when the file does: time, size and inode."""
    try:
        info = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (info.st_mtime_ns, info.st_size, info.st_ino)


def digest(sources: list[Source]) -> str:
    """Return the SHA-256 over all sources, names included."""
    total = hashlib.sha256()
    for source in sources:
        total.update(f"{len(source.text)}:{source.path}\n".encode("utf-8", "surrogateescape") + source.text)
    return total.hexdigest()


def _refuse(path: str, what: str, remedy: str) -> PolicyError:
    return PolicyError([Problem(f"the policy file {what}", path, remedy)], reference="policy-untrusted")
