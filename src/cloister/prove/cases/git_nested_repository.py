"""Make a new repository inside the workspace and register it as a submodule, so that the owner's git status enters it."""

import os
import subprocess

from cloister.prove.inside.support import Box, append

ID = "git-nested-repository"
TITLE = "Make a new repository inside the workspace and register it as a submodule, so that the owner's git status enters it"
PROMISE = "P-021"
CLASSES = (20,)
EXPECT = "not prevented: the run says at its end that the new repository is there"
FRESH = True
WARNED_OF = "vendor"
CHECKS = ("git-runs-nothing",)
LIFTED_BY = ("workspace.mode = overlay",)


def attack(box: Box) -> None:
    """Commit in a nested repository with fsmonitor set, and add it to the outer index as a link to a commit."""
    inner = box.path("vendor")
    os.makedirs(inner)
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    steps = (
        (inner, ["init", "-q"]),
        (inner, ["commit", "-q", "--allow-empty", "-m", "x"]),
        (box.workspace, ["add", "vendor"]),
    )
    for folder, words in steps:
        done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, timeout=20, check=False)
        box.stopped(f"git {words[0]}: exit {done.returncode}")
    try:
        append(f"{inner}/.git/config", '[core]\n\tfsmonitor = "touch \\"$PROVE_MARKER\\"; false"\n')
    except OSError as error:
        box.stopped(f"its configuration: {error.strerror}")
