"""Reading files that hold no secret but say how an agent runs: those of a home, and those that a policy names.

A file of the home is the user's own affair; one that the policy names must be one that nobody but root and whoever the
policy belongs to can write. Neither is waited for where it is a FIFO or a device.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from cloister.host import beneath

SETTINGS_BYTES = 1 << 20


class RefusedError(Exception):
    """A file that is not read, and why."""


def read_home(home: str, name: str, limit: int, forbidden: Iterable[str] = ()) -> bytes | None:
    """Return a file below a home, links resolved; None where there is none, or it leads into `forbidden`.

    Raises:
        RefusedError: it is there and cannot be read, or is longer than `limit` bytes.
    """
    real = os.path.realpath(os.path.join(home, name))
    if not os.path.lexists(real) or _within(real, forbidden):
        return None
    return _read(real, limit)[0]


def read_policy_file(path: str, owners: Iterable[int], limit: int, forbidden: Iterable[str] = ()) -> bytes:
    """Return a file that the policy names.

    Args:
        path: absolute.
        owners: uids that it may belong to.
        limit: in bytes.
        forbidden: directories that an agent can write.

    Raises:
        RefusedError: it is missing, unreadable, somebody else's, writable by others, too long, or in such a directory.
    """
    real = os.path.realpath(path)
    if _within(real, forbidden):
        raise RefusedError("it lies where the agent may write")
    data, status = _read(real, limit)
    if status.st_uid not in set(owners):
        raise RefusedError("it belongs to another user")
    if status.st_mode & 0o022:
        raise RefusedError("others than its owner may write it")
    return data


def read_settings(source: str) -> tuple[bytes | None, str]:
    """Return a file of settings, and what is wrong with it; None and nothing where there is none."""
    try:
        return (read_home("/", source, SETTINGS_BYTES) if source else None), ""
    except RefusedError as error:
        return None, str(error)


def _within(real: str, places: Iterable[str]) -> bool:
    return any(real == place or real.startswith(f"{place}/") for place in places)


def _read(real: str, limit: int) -> tuple[bytes, os.stat_result]:
    try:
        directory = beneath.open_root(os.path.dirname(real))
        try:
            opened = os.open(os.path.basename(real), beneath.FILE_FLAGS, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise RefusedError(f"it cannot be opened: {error.strerror}") from None
    with os.fdopen(opened, "rb") as file:
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode):
            raise RefusedError("it is no file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise RefusedError(f"it is longer than {limit} bytes")
    return data, status
