"""An answer that took long to find (a boot): kept until the host's next start, for exactly what it was about.

It is advice about this host and no more: whoever could forge it is the user, in a directory of the user's own.
"""

from __future__ import annotations

import contextlib
import os
from typing import TypeVar

import msgspec

from cloister.host import private_files

Answer = TypeVar("Answer", bound=msgspec.Struct)
About = tuple[str, ...]


def identity(path: str) -> About:
    """Return a file's path, and what changes with its content."""
    with contextlib.suppress(OSError):
        info = os.stat(path)
        return path, str(info.st_dev), str(info.st_ino), str(info.st_size), str(info.st_mtime_ns), str(info.st_ctime_ns)
    return (path,)


def recall(path: str, about: About, shape: type[Answer]) -> Answer | None:
    """Return the answer that is kept in a file, if it is about exactly this."""
    with contextlib.suppress(msgspec.MsgspecError):
        kept_about, kept = msgspec.json.decode(private_files.read(path) or b"", type=tuple[About, msgspec.Raw])
        return msgspec.json.decode(kept, type=shape) if kept_about == about else None
    return None


def keep(path: str, about: About, answer: msgspec.Struct) -> None:
    """Keep an answer; where that fails, the next one who asks finds out again."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with private_files.locked(os.path.dirname(path)):
            private_files.replace(path, msgspec.json.encode((about, answer)))
