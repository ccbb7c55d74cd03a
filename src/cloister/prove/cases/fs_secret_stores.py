"""Read or change books, prices, switches, logins and keys of Cloister."""

import contextlib
import os
import time

from cloister.prove.inside.support import Box, append, opens

ID = "fs-secret-stores"
TITLE = "Read or change ledger, prices, kill switch, logins or key stores"
PROMISE = "P-007"
CLASSES = (23, 66)
EXPECT = "none of them exists in the sandbox"
FRESH = True
CHECKS = ("nothing-in-store",)

NAMES = {"ledger.db", "authority.pem", "master.key", "prices.toml", "blocked.json", "broker.sock", "identity.sock",
         "placeholders.jsonl"}  # fmt: skip
SEARCH_S = 5.0
LARGE = ("/proc", "/sys", "/usr", "/dev")


def attack(box: Box) -> None:
    """By path, by name wherever it could be, and by making one where ours would be."""
    for path in map(str, box.fact("secret_stores")):
        box.refused(path, "ENOENT EACCES", opens, path)
        box.refused(f"{path}, to write", "ENOENT EACCES EISDIR EROFS", _append_there, path)
    found = []
    deadline = time.monotonic() + SEARCH_S
    for folder, folders, names in (step for top in box.fact("tops") for step in os.walk(top)):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in LARGE]
        if not folder.startswith(box.workspace):
            found += [f"{folder}/{name}" for name in names if name in NAMES]
        if time.monotonic() > deadline:
            break
    box.must(not found, f"found by name: {', '.join(found) or 'none'}")
    for path in map(str, box.fact("secret_stores")):
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            append(f"{os.path.dirname(path)}/cloister-prove-was-here")


def _append_there(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)  # without O_CREAT: a private home may be written
    os.close(descriptor)


def twin(box: Box) -> None:
    """The search finds what is there."""
    with open(box.path("prices.toml"), "w", encoding="utf-8") as file:
        file.write("")
    names = [name for _, _, names in os.walk(box.workspace) for name in names]
    box.works("a file of this name in the workspace", "prices.toml" in names)
