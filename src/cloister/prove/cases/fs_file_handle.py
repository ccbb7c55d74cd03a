"""Open files by handle, which no path and no mount confines."""

import os
import struct

from cloister.prove.inside.support import Box, syscall

ID = "fs-file-handle"
TITLE = "Open files by handle, which no path and no mount confines"
PROMISE = "P-035"
CLASSES = (9,)
EXPECT = "seccomp answers EPERM"


def attack(box: Box) -> None:
    """Take a handle of the workspace, and open the root of its file system by a guessed one, as shocker.c did."""
    handle = struct.pack("<Ii", 8, 1).ljust(136, b"\0")
    mount_id = bytes(4)
    box.refused(
        "name_to_handle_at", "EPERM", syscall, "name_to_handle_at", -100, box.workspace.encode(), handle, mount_id, 0
    )
    directory = os.open(box.workspace, os.O_RDONLY)
    for inode in (2, 32, 64, 128):
        guess = struct.pack("<IiQ", 8, 1, inode)
        box.refused(f"inode {inode}", "EPERM", syscall, "open_by_handle_at", directory, guess, os.O_RDONLY)
    os.close(directory)
