"""The published OCSF schema as a check: what an event has that its class does not know, and what it lacks.

The schema is the one that `pydantic-ocsf` carries (Apache-2.0), uncompiled: classes and objects extend one another, and
a dictionary gives each attribute its type. Profiles are not in it; those that we use stand in `ocsf_profiles.json`.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from pathlib import Path


@functools.cache
def _schema():
    return json.loads(importlib.resources.files("ocsf").joinpath("schemas/v1_7_0.json").read_text())


@functools.cache
def _profiles():
    found = json.loads(Path(__file__).with_name("ocsf_profiles.json").read_text())
    return {name: attributes for name, attributes in found.items() if name != "source"}


def _merged(table, name):
    """Return (attributes, constraints) of a class or object with those of what it extends."""
    own = _schema()[table][name]
    parent, constraints = ({}, {}) if not own.get("extends") else _merged(table, own["extends"])
    attributes = {key: dict(value) for key, value in parent.items()}
    for key, value in own["attributes"].items():
        if key == "$include":
            for path in value:
                profile = Path(path).stem
                for extra, requirement in _profiles().get(profile, {}).items():
                    attributes.setdefault(extra, {"requirement": requirement, "profile": profile})
        else:
            merged = {**attributes.get(key, {}), **{k: v for k, v in value.items() if k != "enum"}}
            merged["enum"] = {**attributes.get(key, {}).get("enum", {}), **value.get("enum", {})}
            attributes[key] = merged
    return attributes, own["constraints"] if own.get("constraints") is not None else constraints


merged = functools.cache(_merged)


@functools.cache
def classes():
    """Return the name of each class by class_uid."""
    found = {0: "base_event"}
    for name, event in _schema()["events"].items():
        if event.get("uid"):
            category, at = event.get("category"), event
            while not category:
                at = _schema()["events"][at["extends"]]
                category = at.get("category")
            found[_schema()["categories_meta"]["attributes"][category]["uid"] * 1000 + event["uid"]] = name
    return found


def mistakes(event):
    """Return what is wrong with an event by the schema; empty when nothing is."""
    name = classes().get(event.get("class_uid"))
    if name is None:
        return [f"no class {event.get('class_uid')}"]
    found = []
    _check_members(event, ("events", name), frozenset(event["metadata"].get("profiles", ())), name, found)
    if event["type_uid"] != event["class_uid"] * 100 + event["activity_id"]:
        found.append("type_uid")
    if event["category_uid"] != event["class_uid"] // 1000:
        found.append("category_uid")
    if event["metadata"]["version"] != _schema()["version"]:
        found.append("metadata.version")
    return found


def _check_members(value, named, profiles, at, found):
    table, name = named
    attributes, constraints = merged(table, name)
    allowed = {key: spec for key, spec in attributes.items() if spec.get("profile") in (None, False, *profiles)}
    found += [f"{at}.{key}: unknown" for key in value if key not in allowed]
    found += [
        f"{at}.{key}: required"
        for key, spec in allowed.items()
        if spec.get("requirement") == "required" and key not in value
    ]
    for rule, names in (constraints or {}).items():
        there = sum(key in value for key in names)
        if (rule == "at_least_one" and not there) or (rule == "just_one" and there != 1):
            found.append(f"{at}: {rule} of {names}")
    for key, inner in value.items():
        if key in allowed:
            _check_value(inner, (key, allowed[key]), profiles, f"{at}.{key}", found)


def _check_value(value, attribute, profiles, at, found):
    key, spec = attribute
    dictionary = _schema()["dictionary"]["attributes"]
    entry = {**dictionary[key], **{k: v for k, v in spec.items() if k != "enum"}}
    if entry.get("is_array"):
        if not isinstance(value, list):
            found.append(f"{at}: no array")
            return
        for index, item in enumerate(value):
            _check_one(item, {**entry, "enum": {}}, profiles, f"{at}[{index}]", found)
        return
    # The numbers of a class are filled in when the schema is compiled; `mistakes` compares them.
    computed = key in ("category_uid", "class_uid", "type_uid")
    enum = {} if computed else {**dictionary[key].get("enum", {}), **spec.get("enum", {})}
    _check_one(value, {**entry, "enum": enum}, profiles, at, found)


def _check_one(value, entry, profiles, at, found):
    types = _schema()["dictionary"]["types"]["attributes"]
    kind = entry["type"]
    if kind in _schema()["objects"]:
        if not isinstance(value, dict):
            found.append(f"{at}: no {kind}")
        elif kind != "object":
            _check_members(value, ("objects", kind), profiles, at, found)
        return
    rule = types[kind]
    base = rule.get("type", kind)
    python = {"string_t": str, "integer_t": int, "long_t": int, "boolean_t": bool, "float_t": float, "json_t": object}[
        base
    ]
    if not isinstance(value, python) or (python is int and isinstance(value, bool)):
        found.append(f"{at}: {value!r} is no {kind}")
    elif entry["enum"] and str(value) not in entry["enum"]:
        found.append(f"{at}: {value!r} is not in the enum")
    elif python is str and "regex" in rule and not re.search(rule["regex"], value):
        found.append(f"{at}: {value!r} does not match {kind}")
    elif python is str and len(value) > rule.get("max_len", len(value)):
        found.append(f"{at}: too long")
    elif "range" in rule and not rule["range"][0] <= value <= rule["range"][1]:
        found.append(f"{at}: out of range")
    elif base == "integer_t" and not -(2**31) <= value < 2**31:
        found.append(f"{at}: more than 32 bits")
