"""Reading what root declared for gateways: directories of documents, skills and plugins, as values.

They become files that a gateway reads and, by their words, is steered with. So each level and entry must be root's
alone to change, and nothing is followed: a link would bring any file of root's into an agent's sandbox.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from cloister.host import beneath
from cloister.plan.service_facts import SourceFile

MAX_ENTRIES = 2_000
MAX_BYTES = 8 << 20
_OTHERS = 0o022


def read_tree(path: str, *, owner: int = 0) -> dict[str, SourceFile]:
    """Return every file below a directory, by its relative path.

    Args:
        path: absolute, without a symbolic link on the way.
        owner: who must own everything in it (besides root).

    Raises:
        OSError: it cannot be read, or a component is a link.
        ValueError: with a sentence: something in it is no plain text file, others could change it, or it is too large.
    """
    found: dict[str, SourceFile] = {}
    with _directory(beneath.open_root(path)) as top:
        _judge(os.fstat(top), path, owner)
        _walk(top, "", path, owner, found)
    return found


def _walk(directory: int, prefix: str, path: str, owner: int, found: dict[str, SourceFile]) -> None:
    for name in sorted(os.listdir(directory)):
        relative, shown = prefix + name, f"{path}/{prefix}{name}"
        info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        _judge(info, shown, owner)
        if stat.S_ISDIR(info.st_mode):
            if name == ".git":
                continue
            with _directory(beneath.open_directory(directory, name)) as below:
                _walk(below, f"{relative}/", path, owner, found)
        elif stat.S_ISREG(info.st_mode):
            with os.fdopen(os.open(name, beneath.FILE_FLAGS, dir_fd=directory), "rb") as file:
                data = file.read(MAX_BYTES + 1)
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"{shown} is no UTF-8 text") from None
            found[relative] = SourceFile(text=text, executable=bool(info.st_mode & 0o100))
        else:
            raise ValueError(f"{shown} is neither a file nor a directory")
        if len(found) > MAX_ENTRIES or sum(len(one.text) for one in found.values()) > MAX_BYTES:
            raise ValueError(f"{path} holds more than {MAX_ENTRIES} files or {MAX_BYTES >> 20} MiB")


def _judge(info: os.stat_result, shown: str, owner: int) -> None:
    if stat.S_ISLNK(info.st_mode):
        raise ValueError(f"{shown} is a link, and links are not followed")
    if info.st_uid not in {0, owner}:
        raise ValueError(f"{shown} belongs to the user {info.st_uid}, not to root")
    if info.st_mode & _OTHERS:
        raise ValueError(f"{shown} can be written by others than root")


@contextmanager
def _directory(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
