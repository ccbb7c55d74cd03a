"""What is carried in from the host's home, and the mount points for it in an agent's own state.

Carried files are bound read-only, not copied: an agent cannot poison its own configuration for
the next run, and no second copy of anything lies about. The mount points lie in a directory
the agent could write in an earlier run, so whatever it put there is looked at without
following links, and removed when it is in the way.
"""

from __future__ import annotations

import os
import stat
from typing import Literal, NamedTuple

from cloister.host.removal import remove_tree


class Carried(NamedTuple):
    """One carried path: below the home, the file or directory it really is, and its kind."""

    name: str
    source: str
    kind: Literal["file", "directory"]


def find_carried(home: str, names: tuple[str, ...], forbidden: tuple[str, ...]) -> tuple[Carried, ...]:
    """Return those of `names` that exist below `home`, links resolved (home-manager makes links).

    A path that leads into `forbidden` (a workspace, a secret, our own directories) is passed over:
    it could have been planted there.
    """
    carried = []
    for name in names:
        source = os.path.realpath(os.path.join(home, name))
        if any(source == path or source.startswith(path + "/") for path in forbidden):
            continue
        try:
            mode = os.stat(source).st_mode
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(mode):
            carried.append(Carried(name, source, "file"))
        elif stat.S_ISDIR(mode):
            carried.append(Carried(name, source, "directory"))
    return tuple(carried)


def make_point(root: str, relative: str, kind: str) -> None:
    """Make a mount point below `root`, fd-relative; anything of another kind in its place is removed.

    Raises:
        OSError: the state directory cannot be written.
    """
    directory, name = _open_parent(root, relative)
    try:
        _clear(directory, name, kind)
    finally:
        os.close(directory)


def seed_file(root: str, relative: str, text: str) -> None:
    """Write a file below `root` where nothing of that name is, fd-relative.

    Raises:
        OSError: the state directory cannot be written.
    """
    directory, name = _open_parent(root, relative)
    try:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, 0o600, dir_fd=directory), "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return
    finally:
        os.close(directory)


def _open_parent(root: str, relative: str) -> tuple[int, str]:
    """Open the directory that holds `relative`, making what is missing; anything in the way is removed."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    parts = relative.split("/")
    try:
        for part in parts[:-1]:
            _clear(directory, part, "directory")
            child = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            os.close(directory)
            directory = child
    except OSError:
        os.close(directory)
        raise
    return directory, parts[-1]


def _clear(directory: int, name: str, kind: str) -> None:
    """Leave exactly one thing called `name`: a directory, or a regular file."""
    wanted = stat.S_ISDIR if kind == "directory" else stat.S_ISREG
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        mode = 0
    if mode and wanted(mode):
        return
    if mode and stat.S_ISDIR(mode):
        remove_tree(directory, name)
    elif mode:
        os.unlink(name, dir_fd=directory)
    if kind == "directory":
        os.mkdir(name, 0o700, dir_fd=directory)
    else:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=directory))
