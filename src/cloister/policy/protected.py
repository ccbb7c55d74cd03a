"""Names in a workspace that stay read-only because programs load them by themselves.

The list is data (`protected.toml`), each entry with its reason. How a name is kept from
being written, and what `.git` needs, is for the workspace layout in `isolation`.
"""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from typing import Literal

import msgspec

Kind = Literal["file", "directory"]
When = Literal["always", "present"]


class ProtectedName(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One name at the top of a workspace."""

    name: str
    """Relative to the workspace."""
    kind: Kind
    """What it is shown as where it does not exist."""
    why: str
    """What would run or change outside if an agent could write it."""
    when: When = "always"
    """`always`: read-only, also when absent at the start. `present`: only where it exists."""
    content: str = ""
    """What a file shows where it does not exist; directories show nothing."""


@functools.cache
def protected_names() -> tuple[ProtectedName, ...]:
    """Return the built-in list, `always` first. Reads packaged data once, on the first call."""
    text = resources.files("cloister.policy").joinpath("protected.toml").read_text("utf-8")
    tables = tomllib.loads(text)
    return tuple(
        msgspec.convert(entry | {"when": when}, ProtectedName)
        for when in ("always", "present")
        for entry in tables[when]
    )


def effective_names(protect: tuple[str, ...], unprotected: tuple[str, ...]) -> tuple[ProtectedName, ...]:
    """Return the built-in list without `workspace.unprotected`, and with `workspace.protect` added as `always`.

    A name in both stays protected: a project file can add to `protect`, and must be obeyed. A name that the
    list does not have is taken for a file when its last part holds a dot behind its first character, else for
    a directory; where it exists, what is there decides.
    """
    builtin = {entry.name: entry for entry in protected_names()}
    asked = sorted({_plain(name) for name in protect})
    lifted = {_plain(name) for name in unprotected}
    own = [
        msgspec.structs.replace(builtin[name], when="always")
        if name in builtin
        else ProtectedName(name=name, kind=_guess(name), why="named in workspace.protect")
        for name in asked
    ]
    return (*own, *(entry for name, entry in builtin.items() if name not in lifted and name not in asked))


def _plain(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in {"", "."})


def _guess(name: str) -> Kind:
    return "file" if "." in name.rpartition("/")[2][1:] else "directory"
