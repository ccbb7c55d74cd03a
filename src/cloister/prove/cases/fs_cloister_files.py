"""Change the policy, the run store or another run's files."""

import contextlib
import os

from cloister.prove.inside.support import Box, read, write

ID = "fs-cloister-files"
TITLE = "Change the policy, the run store or another run's files"
PROMISE = "P-007"
CLASSES = (23,)
EXPECT = "none of them exists in the sandbox"
FRESH = True
CHECKS = ("nothing-in-store",)


def attack(box: Box) -> None:
    """Read and list; then write, which may reach the private home but never the host."""
    box.refused("the policy", "ENOENT EACCES", read, str(box.fact("policy")))
    for folder in box.fact("cloister_paths"):
        box.refused(str(folder), "ENOENT EACCES", os.listdir, str(folder))
    for folder in (os.path.dirname(str(box.fact("policy"))), *box.fact("cloister_paths")):
        with contextlib.suppress(OSError):
            os.makedirs(f"{folder}/runs", exist_ok=True)
            write(f"{folder}/cloister-prove-was-here")
    with contextlib.suppress(OSError):
        write(str(box.fact("policy")), "schema = 1\n")


def twin(box: Box) -> None:
    """A run knows its own id."""
    box.works("CLOISTER_RUN", len(os.environ.get("CLOISTER_RUN", "")) == 10)
