"""Reading presets: those that come with Cloister, and a user's own beside or instead of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType

from cloister.policy.load import load_preset
from cloister.policy.model import Preset

BUILTIN = ("claude", "codex", "openclaw", "pi", "shell")
"""Names of the presets that come with Cloister."""


@functools.cache
def builtin_preset(name: str) -> Preset:
    """Return one preset that comes with Cloister; KeyError for a name not in `BUILTIN`."""
    if name not in BUILTIN:
        raise KeyError(name)
    text = resources.files("cloister.policy.presets").joinpath(f"{name}.toml").read_bytes()
    return load_preset(text, f"preset {name}")


@functools.cache
def builtin_presets() -> Mapping[str, Preset]:
    """Return every preset that comes with Cloister, by name. Reads packaged data once, on the first call."""
    return MappingProxyType({name: builtin_preset(name) for name in BUILTIN})


def all_presets(own: Mapping[str, str | bytes]) -> Mapping[str, Preset]:
    """Return the built-in presets with a user's own added, or put in the place of one of the same name.

    Args:
        own: the text of each file of the user's presets directory, by name without `.toml`.

    Raises:
        PolicyError: one of the texts is wrong.
    """
    return MappingProxyType(
        dict(builtin_presets()) | {name: load_preset(text, f"preset {name}") for name, text in own.items()}
    )
