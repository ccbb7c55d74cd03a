"""Reach hidden or protected files by another spelling of their names."""

import os

from cloister.prove.inside.support import Box, append, read

ID = "fs-spellings"
TITLE = "Reach hidden or protected files by another spelling of their names"
PROMISE = "P-031"
CLASSES = (15,)
EXPECT = "there is no list of patterns to get round: mounts know no spelling"
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


def attack(box: Box) -> None:
    """Slashes, dots, upper case, Unicode look-alikes and bytes that are no text."""
    secret = str(box.fact("secret"))
    for path in (
        secret.replace("/", "//"),
        secret + "/",
        secret.replace("/outside/", "/./outside/"),
        secret.upper(),
        secret + "\u200b",
        secret.replace("secret", "ſecret"),
        "/../.." + secret,
    ):
        box.refused(path, "ENOENT ENOTDIR EACCES", read, path)
    for name in (
        "./.mcp.json",
        "src/../.mcp.json",
        ".//.mcp.json",
        ".git/../.mcp.json",
        ".git//hooks/pre-commit",
        ".git/./hooks/../hooks/pre-commit",
        "src/../.git/config",
        ".vscode/../.vscode/tasks.json",
    ):
        box.refused(name, "EROFS EACCES ENXIO", append, box.path(name))


def twin(box: Box) -> None:
    """Odd names are handled like any other in the workspace."""
    for name in (b"\xff\xfe", "ein Wört\n".encode(), b"x" * 255):
        path = os.fsencode(box.workspace) + b"/" + name
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        os.unlink(path)
