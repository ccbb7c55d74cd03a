"""Which models an agent may use, and under which names. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import msgspec

from cloister.llm.routes import Shape
from cloister.policy.model import Llm


class Access:
    """The model names of one agent's policy."""

    def __init__(self, llm: Llm) -> None:
        """Keep patterns and aliases; answers are remembered, since agents use few models."""
        self._patterns = llm.models
        self._aliases = llm.aliases
        self._known: dict[str, str | None] = {}

    def resolve(self, asked: str) -> str | None:
        """Return the model that is meant, or None when it is not allowed.

        The owner named an alias's model, so it is allowed by that.
        """
        try:
            return self._known[asked]
        except KeyError:
            pass
        if asked in self._aliases:
            meant: str | None = self._aliases[asked]
        else:
            meant = asked if self._allows(asked) else None
        if len(self._known) < 1024:  # noqa: PLR2004 - an agent may ask for any number of names
            self._known[asked] = meant
        return meant

    def describe(self) -> str:
        """Return what is allowed, for a person."""
        names = (*self._aliases, *self._patterns) if self._patterns else ("every model",)
        return ", ".join(names)

    def names(self) -> tuple[str, ...]:
        """Return the names that stand for one model each: aliases, and entries without a wildcard."""
        return (*self._aliases, *(name for name in self._patterns if not any(sign in name for sign in "*?[")))

    def _allows(self, model: str) -> bool:
        return not self._patterns or any(fnmatchcase(model, pattern) for pattern in self._patterns)


class _Entry(msgspec.Struct):
    id: str


def filter_list(answer: bytes, access: Access, shape: Shape) -> bytes | None:
    """Return an upstream's list of models without those that are not allowed, with the aliases; None if it is none.

    Entries stay as they came. Aliases are put in front, in the client's own shape.
    """
    try:
        whole = msgspec.json.decode(answer, type=dict[str, msgspec.Raw])
        entries = msgspec.json.decode(whole["data"], type=list[msgspec.Raw])
        kept = [entry for entry in entries if access.resolve(msgspec.json.decode(entry, type=_Entry).id) is not None]
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError):
        return None
    listed = {msgspec.json.decode(entry, type=_Entry).id for entry in kept}
    added = [_entry(name, shape) for name in access.names() if name not in listed]
    whole["data"] = msgspec.Raw(msgspec.json.encode([*added, *kept]))
    return msgspec.json.encode(whole)


def own_list(names: Iterable[str], shape: Shape) -> bytes:
    """Return a list of models of our own, for upstreams that have none."""
    entries = [_entry(name, shape) for name in names]
    if shape == "anthropic":
        return msgspec.json.encode({"data": entries, "has_more": False, "first_id": None, "last_id": None})
    return msgspec.json.encode({"object": "list", "data": entries})


def _entry(name: str, shape: Shape) -> dict[str, object]:
    if shape == "anthropic":
        return {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}
    return {"id": name, "object": "model", "created": 0, "owned_by": "cloister"}
