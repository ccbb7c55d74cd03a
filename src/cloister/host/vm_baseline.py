"""What a workspace's disk held when a guest got it: one record per name, kept beside the image until it is handed back.

It is written by what filled the image, from what was written there, so a directory that changes while it is copied
makes no false difference. The file is the user's own, in the run's records; a guest never sees it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import msgspec

from cloister.errors import DeniedError
from cloister.plan.workspace import Value

SUFFIX, NEW = ".baseline", ".new"
_MAX_BYTES = 1 << 30


class Was(NamedTuple):
    """How a name looked on the fresh image."""

    inode: int
    mode: int
    """With the kind, as in stat(2)."""
    size: int
    mtime_ns: int
    ctime_ns: int
    given: bool = True
    """The host has it; else it was put there for the guest only."""


class Baseline(Value, frozen=True):
    """The whole of it."""

    root: str
    """The workspace on the host."""
    entries: dict[bytes, Was]
    """By path relative to the workspace."""
    kept: frozenset[bytes] = frozenset()
    """Paths whose content was not put on the disk (hidden, unreadable): the host's are never touched."""
    protected: tuple[str, ...] = ()
    """Paths that the guest was told to keep read-only."""
    unprotected: tuple[str, ...] = ()
    """Names of the built-in list that the policy leaves writable."""


class _Kept(Value, frozen=True):
    root: str
    paths: list[bytes]
    entries: list[Was]
    kept: list[bytes]
    protected: list[bytes]
    unprotected: list[bytes]


def save(image: str, baseline: Baseline) -> None:
    """Write the baseline of an image beside it.

    Raises:
        OSError: it cannot be written.
    """
    data = msgspec.msgpack.encode(
        _Kept(
            os.fsencode(baseline.root).decode("latin-1"), list(baseline.entries), list(baseline.entries.values()),
            sorted(baseline.kept), [os.fsencode(name) for name in baseline.protected],
            [os.fsencode(name) for name in baseline.unprotected],
        )
    )  # fmt: skip
    partial = f"{image}{SUFFIX}{NEW}"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.rename(partial, f"{image}{SUFFIX}")


def load(image: str) -> Baseline:
    """Read the baseline of an image.

    Raises:
        DeniedError: it is missing or damaged, so nothing can be said about what a guest changed.
    """
    descriptor = open_baseline(image)
    try:
        return read(descriptor, f"{image}{SUFFIX}")
    finally:
        os.close(descriptor)


def open_baseline(image: str) -> int:
    """Open the baseline of an image, for reading it elsewhere.

    Raises:
        DeniedError: it is missing.
    """
    path = f"{image}{SUFFIX}"
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _unknown(path) from error


def _unknown(path: str) -> DeniedError:
    message = "what the virtual machine's workspace held at its start is not known any more"
    return DeniedError("vm-baseline", message, where=path)


def read(descriptor: int, path: str) -> Baseline:
    """Read an open baseline, whose path is for messages.

    Raises:
        DeniedError: it is damaged.
    """
    try:
        with open(descriptor, "rb", closefd=False) as file:
            kept = msgspec.msgpack.decode(file.read(_MAX_BYTES), type=_Kept)
    except (OSError, msgspec.DecodeError) as error:
        raise _unknown(path) from error
    if len(kept.paths) != len(kept.entries):
        raise DeniedError("vm-baseline", "the record of the workspace at its start is damaged", where=path)
    root = os.fsdecode(kept.root.encode("latin-1"))
    entries = dict(zip(kept.paths, kept.entries, strict=True))
    protected, unprotected = (tuple(map(os.fsdecode, names)) for names in (kept.protected, kept.unprotected))
    return Baseline(root, entries, frozenset(kept.kept), protected, unprotected)
