"""Finding an agent's program on the host, and what must be visible for it to run.

A program in `/usr` needs nothing. One below the home (npm, nvm, pipx, a native installer)
needs its package directory and its interpreter, read-only, at the same paths. Nothing below
the workspace counts: what an earlier run may have written must never widen the next sandbox
(PEERS section 4, no. 3). Reads the file system; decides no policy.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from cloister.errors import CloisterError, DeniedError

SYSTEM = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib64/", "/nix/store/", "/gnu/store/")
_MAX_INTERPRETERS = 8
_SHEBANG_BYTES = 256  # Linux reads BINPRM_BUF_SIZE (256) bytes, execve(2)


class Program(NamedTuple):
    """A resolved program: the file, what to bind read-only, and names to put on the PATH."""

    path: str
    binds: tuple[str, ...]
    names: tuple[tuple[str, str], ...]


class ProgramMissingError(CloisterError):
    """The program is not on the caller's PATH: exit code 127, as a shell would say."""

    exit_code = 127


def find_program(name: str, search_path: str, *, home: str, forbidden: tuple[str, ...]) -> Program:
    """Resolve `name` on `search_path` and collect what it needs.

    Args:
        name: a bare name or an absolute path; a relative path with a slash is the agent's own affair.
        search_path: the caller's PATH; relative and `forbidden` entries are passed over.
        home: never bound as a whole, nor any parent of it.
        forbidden: directories an agent may write (workspaces); nothing in them is resolved.

    Raises:
        ProgramMissingError: nothing executable of that name.
        DeniedError: running it would need a directory that must not be shown.
    """
    found = _search(name, search_path, forbidden)
    if found is None:
        raise ProgramMissingError(
            "program-not-found",
            f"no program named {name!r} on the PATH",
            where=search_path,
            remedy=f"install {name}, or set `command` of the agent to its full path",
        )
    binds: list[str] = []
    names: dict[str, str] = {}
    pending = [(os.path.basename(name), found)]
    while pending and len(names) < _MAX_INTERPRETERS:
        short, path = pending.pop()
        real = os.path.realpath(path)
        if _inside(real, forbidden):
            raise DeniedError(
                "program-in-workspace",
                "the program lies where an agent may write",
                where=real,
                remedy="install it elsewhere",
            )
        names[short] = real
        if not real.startswith(SYSTEM):
            binds.append(_package(real, home))
        pending += _interpreter(real, search_path, forbidden, set(names))
    return Program(names[os.path.basename(name)], tuple(dict.fromkeys(binds)), tuple(names.items()))


def _search(name: str, search_path: str, forbidden: tuple[str, ...]) -> str | None:
    if "/" in name:
        return name if os.path.isabs(name) and _executable(name) else None
    for directory in search_path.split(":"):
        if not os.path.isabs(directory) or _inside(os.path.realpath(directory), forbidden):
            continue
        candidate = os.path.join(directory, name)
        if _executable(candidate):
            return candidate
    return None


def _executable(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode) and os.access(path, os.X_OK)
    except (OSError, ValueError):
        return False


def _interpreter(path: str, search_path: str, forbidden: tuple[str, ...], known: set[str]) -> list[tuple[str, str]]:
    """Return the interpreter of a script as (name, path); `env NAME` is looked up like the program itself."""
    try:
        with open(path, "rb") as file:
            line = file.read(_SHEBANG_BYTES).split(b"\n", 1)[0]
    except OSError:
        return []
    if not line.startswith(b"#!"):
        return []
    words = line[2:].decode("utf-8", "surrogateescape").split()
    if words and os.path.basename(words[0]) == "env":
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        found = _search(words[0], search_path, forbidden) if words else None
        return [(words[0], found)] if found and words[0] not in known else []
    return [(os.path.basename(words[0]), words[0])] if words and _executable(words[0]) else []


def _package(real: str, home: str) -> str:
    """Return the smallest directory or file that makes the program complete."""
    parts = real.split("/")
    if "node_modules" in parts:
        return _safe("/".join(parts[: parts.index("node_modules") + 1]), real, home)
    directory = os.path.dirname(real)
    if os.path.basename(directory) != "bin":
        return real
    prefix = os.path.dirname(directory)
    # A `bin` beside `lib` is an installed tree (nvm, pyenv, a virtual environment); `~/bin` is not.
    if os.path.isdir(os.path.join(prefix, "lib")) and prefix not in (home, os.path.join(home, ".local")):
        return _safe(prefix, real, home)
    return real


def _safe(directory: str, real: str, home: str) -> str:
    """Refuse to show the home itself, or something above it."""
    if directory in ("", "/") or (home + "/").startswith(directory + "/"):
        return real
    return directory


def _inside(path: str, directories: tuple[str, ...]) -> bool:
    return any(path == directory or path.startswith(directory + "/") for directory in directories)
