"""Reach a hidden file through the magic links of /proc."""

import os

from cloister.prove.inside.support import Box, read

ID = "fs-proc-aliases"
TITLE = "Reach a hidden file through the magic links of /proc"
PROMISE = "P-018"
CLASSES = (8, 34)
EXPECT = "all of them lead back into the sandbox"


def attack(box: Box) -> None:
    """Root and working directory of every process, and every open descriptor."""
    secret = str(box.fact("secret"))
    up = "/".join([".."] * (box.workspace.count("/") + 2))
    for pid in ["self", "thread-self", *(name for name in os.listdir("/proc") if name.isdigit())]:
        for alias in (
            f"/proc/{pid}/root{secret}",
            f"/proc/{pid}/cwd/{up}{secret}",
            f"/proc/{pid}/root/proc/1/root{secret}",
        ):
            box.refused(alias, "ENOENT EACCES", read, alias)
    for number in os.listdir("/proc/self/fd"):
        box.refused(
            f"/proc/self/fd/{number}/..", "ENOENT ENOTDIR EACCES", read, f"/proc/self/fd/{number}/../../..{secret}"
        )


def twin(box: Box) -> None:
    """The link to the own root works."""
    box.works("/proc/self/root", os.path.isdir("/proc/self/root/usr"))
