"""Put a program or a Python module where the owner's or root's tools look."""

import os
import sys

from cloister.prove.inside.support import Box, write

ID = "fs-program-directories"
TITLE = "Put a program or a Python module where the owner's or root's tools look"
PROMISE = "P-019"
CLASSES = (13,)
EXPECT = "EROFS, or the directory does not exist"
SHAPE = "any"


def attack(box: Box) -> None:
    """Every directory of the caller's PATH, and where interpreters load code from."""
    folders = [str(path) for path in box.fact("host_path")]
    folders += [
        "/usr/bin",
        "/usr/sbin",
        "/usr/local/bin",
        "/usr/local/sbin",
        "/usr/lib/python3/dist-packages",
        "/usr/local/lib",
        "/opt",
        "/usr/lib/systemd/system",
        "/usr/share/bash-completion",
        "/run/cloister/bin",
        *(path for path in sys.path if path),
    ]
    for folder in dict.fromkeys(folders):
        if folder == box.home or folder.startswith((f"{box.home}/", "/tmp")):
            continue
        box.refused(folder, "EROFS ENOENT EACCES ENOTDIR", write, f"{folder}/cloister-prove-was-here")


def twin(box: Box) -> None:
    """Programs there can be run."""
    box.works("/usr/bin/env", os.access("/usr/bin/env", os.X_OK))
