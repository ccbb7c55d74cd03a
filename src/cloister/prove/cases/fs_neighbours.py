"""Write beside the workspace, where only the name's beginning is the same."""

import contextlib
import os

from cloister.prove.inside.support import Box, read, write

ID = "fs-neighbours"
TITLE = "Write beside the workspace, where only the name's beginning is the same"
PROMISE = "P-017"
CLASSES = (16,)
EXPECT = "nothing beside the workspace reaches the host"
CHECKS = ("nothing-beside-workspace",)


def attack(box: Box) -> None:
    """Make siblings with a longer and a shorter name; on the host they must not appear."""
    parent = os.path.dirname(box.workspace)
    for path in (f"{box.workspace}-cloister-prove-was-here", f"{parent}/cloister-prove-was-here"):
        with contextlib.suppress(OSError):
            write(path)
    seen = [name for name in os.listdir(parent) if "was-here" not in name and name != os.path.basename(box.workspace)]
    visible = [name for name in seen if os.path.isdir(f"{parent}/{name}") and os.listdir(f"{parent}/{name}")]
    box.must(not visible, f"beside the workspace: {visible or 'nothing'}")
    box.refused("the neighbour's file", "ENOENT EACCES", read, str(box.fact("secret")))
