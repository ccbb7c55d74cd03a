"""What of a home is carried in for an agent, and where it lies there: one answer for both backends.

A product's configuration lies in its own directory (the first of the preset's `state`), unless the system's policy says
that this user keeps it elsewhere (`[users.NAME] config`). Only where things are looked for moves: inside they are where
the product looks.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from cloister.host.carry import Carried, find_carried
from cloister.host.plain_files import read_settings
from cloister.plan.settings import form_of, merged, merged_models
from cloister.policy.model import Agent, Preset

NOT_READ = "[file-not-read]"
"""Closes a notice of a file of the home that could not be used."""


_SHOWN = 8


class HomeFiles(NamedTuple):
    """What was found in a home."""

    carried: tuple[Carried, ...]
    secrets: tuple[str, ...]
    """Absolute paths of what must not be shown, links resolved."""
    masks: tuple[tuple[str, str], ...]
    """Names below the home of secrets inside a carried directory, each with `file` or `directory`."""
    settings: str
    """Where the product's settings lie, links resolved; empty without any."""
    environment: str
    """Name below the home of the product's own file of variables; empty for none."""
    models: tuple[tuple[str, str], ...]
    """Names below the home of files that tell of models, with where they lie, links resolved; those that exist."""


def home_files(
    agent: Agent, preset: Preset, home: str, *, config: str = "", forbidden: tuple[str, ...] = ()
) -> HomeFiles:
    """Look for everything that is carried in.

    Args:
        agent: `carry` names what, the preset's own included.
        preset: which of it is secret, and which holds settings.
        home: the user's home.
        config: the user's own place for the configuration, below the home.
        forbidden: directories that nothing is taken from.
    """
    own = preset.state[0] if preset.state else ""
    names = [name.removeprefix("~/").removeprefix(home + "/") for name in agent.carry]
    places = {name: moved(name, own, config) for name in names}
    hidden = {place for name in preset.secrets for place in (name, moved(name, own, config))}
    secrets = {os.path.realpath(f"{home}/{place}") for place in hidden}
    found = find_carried(home, tuple(dict.fromkeys(places.values())), (*forbidden, *secrets))
    by_place = {path.name: path for path in found}
    carried = tuple(by_place[place]._replace(name=name) for name, place in places.items() if place in by_place)
    settings = next((path.source for path in carried if path.name == preset.settings and path.kind == "file"), "")
    variables = moved(preset.environment_file, own, config)
    lists = [name for name in preset.model_files if name.endswith(".json")]
    models = {name: os.path.realpath(f"{home}/{moved(name, own, config)}") for name in lists}
    told = tuple((name, path) for name, path in models.items() if _is_own(path, forbidden))
    return HomeFiles(carried, tuple(sorted(secrets)), tuple(_masks(preset, carried)), settings, variables, told)


def _is_own(path: str, forbidden: tuple[str, ...]) -> bool:
    return os.path.isfile(path) and not any(f"{path}/".startswith(f"{place}/") for place in forbidden)


def moved(name: str, own: str, config: str) -> str:
    """Return where a name below the home really lies, for a user who keeps the directory `own` at `config`."""
    config = config.removeprefix("~/").rstrip("/")
    if not config or not own or not f"{name}/".startswith(f"{own}/"):
        return name
    return (config + name[len(own) :]).rstrip("/")


def merge_settings(agent: Agent, preset: Preset, source: str) -> tuple[bytes, tuple[str, ...]]:
    """Return the settings to show, the policy's laid over the home's, and what the person should know."""
    host, unreadable = read_settings(source)
    data, complaint = merged(host, agent.settings, form_of(preset.settings))
    why = f"was not read: {unreadable}" if unreadable else complaint
    return data, (f"~/{preset.settings} {why}: only the policy's settings count {NOT_READ}",) if why else ()


def merge_models(name: str, text: str, source: str) -> tuple[bytes, tuple[str, ...]]:
    """Return a file of models, the policy's over the home's without its keys, and what the person should know."""
    host, unreadable = read_settings(source)
    data, complaint, dropped = merged_models(host, json.loads(text))
    if why := f"was not read: {unreadable}" if unreadable else complaint:
        return data, (f"~/{name} {why}: only the policy's providers count {NOT_READ}",)
    more = f" and {len(dropped) - _SHOWN} more" if len(dropped) > _SHOWN else ""
    told = f"~/{name} is there without {', '.join(dropped[:_SHOWN])}{more}: keys of models are the policy's affair"
    return data, (told,) if dropped else ()


def said_aloud(notices: tuple[str, ...]) -> tuple[str, ...]:
    """Return the notices that a person must see after the run, not only in its receipt."""
    return tuple(notice for notice in notices if notice.endswith(NOT_READ))


def _masks(preset: Preset, carried: tuple[Carried, ...]) -> list[tuple[str, str]]:
    """Return secrets that exist inside a carried directory."""
    found = []
    for top in carried:
        for name in preset.secrets if top.kind == "directory" else ():
            path = f"{top.source}{name[len(top.name) :]}"
            if name.startswith(f"{top.name}/") and os.path.lexists(path):
                found.append((name, "directory" if os.path.isdir(path) else "file"))
    return found
