"""Files that hold secrets: read only where nobody but their owner could have read or swapped them.

The rules are those of ssh for private keys, and one more: the last name of the path is no
link, since a link that an agent made in a writable place would turn any file of the user into
"the secret". Sources: open(2), path_resolution(7), systemd.exec(5) ("Credentials").
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterable

MAX_BYTES = 64 * 1024


class UnavailableError(Exception):
    """A secret that cannot be had: why, and something to type. Holds nothing of the secret."""

    def __init__(self, why: str, remedy: str = "") -> None:
        """Keep both."""
        super().__init__(why)
        self.why = why
        self.remedy = remedy


def read_private(path: str, uid: int, *, forbidden: Iterable[str] = ()) -> bytes:
    """Return the content of a file that only `uid` or root can read or replace.

    Args:
        path: absolute.
        uid: whose secret it is.
        forbidden: directories that an agent can write.

    Raises:
        UnavailableError: it is missing, unreadable, a link, open to others, or too large.
    """
    directory, name = os.path.split(path)
    real = os.path.realpath(directory)
    if any(real == place or real.startswith(f"{place}/") for place in forbidden):
        raise UnavailableError("it lies where the agent may write", "move it out of the workspace")
    _check_directories(real, uid)
    target = os.path.join(real, name)
    data, info = _read(target, f"(umask 077; cat > {shlex.quote(target)})")
    if info.st_uid not in (uid, 0):
        raise UnavailableError("it belongs to another user", f"chown {uid} {path}")
    if info.st_mode & 0o077:
        raise UnavailableError("others than its owner may read or write it", f"chmod 600 {path}")
    return data


def read_credential(directory: str, name: str) -> bytes:
    """Return a credential that systemd passed to this process (`$CREDENTIALS_DIRECTORY`).

    Modes are not judged: systemd keeps others out by the directory, and an ACL makes files look open to a group.

    Raises:
        UnavailableError: there is none of this name.
    """
    if not directory.startswith("/"):
        raise UnavailableError("this process was not started with credentials", "set LoadCredential= in its unit")
    return _read(f"{directory}/{name}")[0]


def without_newline(data: bytes) -> bytes:
    """Drop the one newline that editors and `echo` put at the end."""
    return data[:-2] if data.endswith(b"\r\n") else data.removesuffix(b"\n")


def _read(path: str, missing: str = "") -> tuple[bytes, os.stat_result]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UnavailableError("there is no such file", missing) from None
    except OSError as error:
        if os.path.islink(path):
            raise UnavailableError("it is a link", f"name what it leads to: file:{os.path.realpath(path)}") from None
        raise UnavailableError(f"it cannot be opened: {error.strerror}") from None
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise UnavailableError("it is not a regular file")
        data = b""
        while len(data) <= MAX_BYTES and (chunk := os.read(descriptor, MAX_BYTES + 1)):
            data += chunk
    except OSError as error:
        raise UnavailableError(f"it cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if len(data) > MAX_BYTES:
        raise UnavailableError(f"it is larger than {MAX_BYTES // 1024} KiB")
    return data, info


def _check_directories(path: str, uid: int) -> None:
    """Refuse directories whose entries somebody else could swap; a sticky one keeps an owner's entries his."""
    while True:
        try:
            info = os.stat(path)
        except OSError:
            raise UnavailableError("there is no such file") from None
        if info.st_uid not in (uid, 0):
            raise UnavailableError(f"its directory {path} belongs to another user")
        if info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX:
            raise UnavailableError(f"everybody may write its directory {path}", f"chmod o-w {path}")
        if path == "/":
            return
        path = os.path.dirname(path)
