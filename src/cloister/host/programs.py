"""Find programs of the host that a run's safety stands on, and trust only those the system's owner installed.

The search path of a developer often has directories an agent may write to (a project's
`node_modules/.bin`, `~/.local/bin`). A `bwrap` planted there would run outside any sandbox at the
next start. So system directories come first, and whatever is found counts only if nobody but
the system's owner can change the program or any directory on the way to it. Nothing is started here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cloister.plan.facts import Program

SYSTEM_DIRECTORIES = ("/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin", "/run/current-system/sw/bin")


def find(name: str, search: str) -> Program:
    """Return the program `name`, looked up in the system directories and then in `search`, a PATH.

    Relative parts of the path are skipped. A link stays a link in the answer, since some programs
    go by the name they are called with (pasta is a link to passt). What was found but is not
    trusted is named in `refused`.
    """
    owner = Path("/").stat().st_uid
    refused = ""
    for directory in (*SYSTEM_DIRECTORIES, *search.split(":")):
        if not directory.startswith("/"):
            continue
        path = Path(directory, name)
        if not (path.is_file() and os.access(path, os.X_OK)):
            continue
        real, place = path.resolve(), Path(directory).resolve()
        if all(trusted(each, owner) for each in {real, *real.parents, place, *place.parents}):
            return Program(path=str(path))
        refused = refused or str(path)
    return Program(refused=refused)


def trusted(path: Path, owner: int) -> bool:
    """Return whether only root and `owner`, the owner of `/`, can change this file or directory.

    Inside rootless containers `/` may belong to another id than 0, which then stands for the
    system. In a directory with the sticky bit, others cannot touch what is not theirs (inode(7)).
    """
    try:
        status = path.stat()
    except OSError:
        return False
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    return status.st_uid in {0, owner} and (not shared or bool(sticky))
