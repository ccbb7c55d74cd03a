"""Plant links in the agent's own state, which the next start mounts again."""

import contextlib
import os

from cloister.prove.inside.support import Box, read

ID = "fs-next-start-state"
TITLE = "Plant links in the agent's own state, which the next start mounts again"
PROMISE = "P-017"
CLASSES = (3,)
EXPECT = "links resolve inside the sandbox, and mount points of the next start are not followed out"
STAGES = ("plant", "attack")
PROCEDURE = "next-start"


def plant(box: Box) -> None:
    """Link everywhere in the home, also at the places where files are carried in."""
    for folder, folders, _ in os.walk(box.home):
        if folder.startswith(box.workspace):
            folders.clear()
            continue
        for number, target in enumerate((str(box.fact("secret")), "/etc/shadow", "/")):
            with contextlib.suppress(OSError):
                os.symlink(target, f"{folder}/evil-{number}")
    box.stopped("planted")


def attack(box: Box) -> None:
    """Follow what is still there."""
    box.refused("/etc/shadow", "ENOENT EACCES", read, "/etc/shadow")
    for folder, folders, files in os.walk(box.home):
        for name in [*folders, *files]:
            if name == "evil-0":
                box.refused(f"{folder}/{name}", "ENOENT EACCES", read, f"{folder}/{name}")
