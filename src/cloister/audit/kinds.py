"""The table of kinds of events (`kinds.toml`): what each is called by others."""

from __future__ import annotations

import functools
import importlib.resources

import msgspec


class Kind(msgspec.Struct, frozen=True, rename={"class_uid": "class", "activity_id": "activity"}):
    """What one kind of event is in OCSF, and its words for people."""

    class_uid: int
    activity_id: int
    severity: int
    name: str


@functools.cache
def kinds() -> dict[str, Kind]:
    """Return all kinds, by name."""
    text = importlib.resources.files("cloister.audit").joinpath("kinds.toml").read_bytes()
    return msgspec.toml.decode(text, type=dict[str, Kind])


def kind_of(name: str) -> Kind:
    """Return a kind; one that a newer version wrote is the base class with activity *Other* (OCSF `base_event`)."""
    return kinds().get(name) or Kind(0, 99, 1, name)
