"""From the text of a policy file to a `Policy`, or to every mistake that is in it.

Pure: it takes text and a file name; reading from disk is elsewhere. A file with a mistake is
refused as a whole, it never falls back to defaults. msgspec reports one mistake per
conversion, so the tables are walked key by key and each leaf is converted by itself. What
values may be combined is for `check`, which runs here last.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from cloister.errors import PolicyError, Problem
from cloister.policy.check import check_policy, check_preset, check_project
from cloister.policy.document import Document, Mistakes, read
from cloister.policy.model import SCHEMA, Policy, Preset, Project
from cloister.policy.scanner import Path
from cloister.policy.secretscan import looks_secret

T = TypeVar("T", bound=msgspec.Struct)


def load(text: str | bytes, name: str, *, preset_names: tuple[str, ...] | None = None) -> Policy:
    """Return the policy a text holds.

    Args:
        text: TOML, or JSON when `name` ends in `.json` or the text begins with `{`.
        name: the file's name, for messages.
        preset_names: the presets that exist; None leaves `preset` unchecked.

    Raises:
        PolicyError: `policy-unreadable` or `policy-invalid`, with every mistake, its line and its remedy.
    """
    return load_document(read(text, name), preset_names=preset_names)


def load_document(document: Document, *, preset_names: tuple[str, ...] | None = None) -> Policy:
    """Return the policy of a document that was read before, so that its raw tables can be merged later."""
    mistakes = Mistakes(document)
    policy = convert(document, Policy, mistakes)
    check_policy(policy, mistakes, preset_names=preset_names)
    return policy


def load_preset(text: str | bytes, name: str) -> Preset:
    """Return the preset a text holds; raises like `load`."""
    document = read(text, name)
    mistakes = Mistakes(document)
    preset = convert(document, Preset, mistakes)
    check_preset(preset, mistakes)
    return preset


def load_project(text: str | bytes, name: str) -> tuple[Project, Document]:
    """Return a project file (`.cloister.toml`) and its raw tables, which `tighten` takes; raises like `load`."""
    document = read(text, name)
    mistakes = Mistakes(document)
    project = convert(document, Project, mistakes)
    check_project(project, mistakes)
    return project, document


def convert(document: Document, kind: type[T], mistakes: Mistakes) -> T:
    """Return the document's tables as `kind`, and note every mistake of form in them.

    What is broken is left out of the result, so that the rest can still be checked for meaning:
    the caller must call `mistakes.settle` before it uses the result for anything else.
    """
    _check_schema(document)
    _walk(document.tables, kind, (), mistakes)
    mistakes.close_broken()
    tables = document.tables
    for path in sorted(mistakes.paths, key=len, reverse=True):
        tables = _without(tables, path)
    try:
        return msgspec.convert(tables, kind)
    except msgspec.ValidationError as error:  # the walk knows less than msgspec: still a mistake, never a default
        mistakes.settle()
        raise PolicyError([Problem(str(error), document.name)]) from error


def _without(value: Any, path: Path) -> Any:
    """Return a copy without one key, or with an empty text for one list item, so that no index moves."""
    head, rest = path[0], path[1:]
    if isinstance(value, dict):
        if not rest:
            return {key: item for key, item in value.items() if key != head}
        return value | {head: _without(value[head], rest)} if head in value else value
    if isinstance(value, list) and isinstance(head, int):
        return [*value[:head], _without(value[head], rest) if rest else "", *value[head + 1 :]]
    return value


def _check_schema(document: Document) -> None:
    """Refuse another format by itself: its other keys mean nothing to this version."""
    found = document.tables.get("schema")
    if found is None:
        message, remedy = "the key schema is missing", f"write `schema = {SCHEMA}` as the first line"
    elif isinstance(found, bool) or not isinstance(found, int):
        message, remedy = f"schema is a number, not {_kind_of(found)}", f"schema = {SCHEMA}"
    elif found != SCHEMA:
        message, remedy = f"schema {found} is not known to this version of Cloister", f"schema = {SCHEMA}"
    else:
        return
    raise PolicyError([Problem(message, document.where(("schema",)), remedy)])


def _walk(value: object, kind: Any, path: Path, mistakes: Mistakes) -> None:
    """Note every mistake of form at and below `path`."""
    kind = _bare(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        _walk_table(value, kind, path, mistakes)
    elif get_origin(kind) is dict:
        if not isinstance(value, dict):
            mistakes.add(path, f"expected a table, got {_kind_of(value)}")
            return
        for key, item in value.items():
            if _is_text(key, (*path, key), mistakes):
                _walk(item, get_args(kind)[1], (*path, key), mistakes)
    elif get_origin(kind) is tuple:
        if not isinstance(value, list):
            remedy = f"[{_quoted(value)}]" if isinstance(value, str) and not looks_secret(value) else ""
            mistakes.add(path, f"expected a list, got {_kind_of(value)}", remedy)
            return
        for index, item in enumerate(value):
            _walk(item, get_args(kind)[0], (*path, index), mistakes)
    else:
        _walk_leaf(value, kind, path, mistakes)


def _walk_table(value: object, kind: type[msgspec.Struct], path: Path, mistakes: Mistakes) -> None:
    if not isinstance(value, dict):
        mistakes.add(path, f"expected a table, got {_kind_of(value)}")
        return
    known = _fields(kind)
    for key, item in value.items():
        if key in known:
            _walk(item, known[key].type, (*path, key), mistakes)
        else:
            mistakes.add((*path, key), "unknown key", _suggest(key, kind))
    for name, info in known.items():
        if info.required and name not in value:
            mistakes.add(path, f"the key {name} is missing")


def _walk_leaf(value: object, kind: Any, path: Path, mistakes: Mistakes) -> None:
    """Convert one value; unions of a table and text go by what the value is."""
    if get_origin(kind) in {Union, types.UnionType}:
        tables = [item for item in get_args(kind) if isinstance(item, type) and issubclass(item, msgspec.Struct)]
        if tables and isinstance(value, dict):
            _walk(value, tables[0], path, mistakes)
            return
    if isinstance(value, str) and not _is_text(value, path, mistakes):
        return
    if isinstance(value, float) and not math.isfinite(value):
        mistakes.add(path, "not a finite number")
        return
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        mistakes.add(path, f"expected {_describe(kind)}, got {_shown(value)}", _nearest(value, kind, str(error)))


def _is_text(value: object, path: Path, mistakes: Mistakes) -> bool:
    """Refuse what no file name, variable or argument can hold: NUL, and halves of UTF-16 pairs from JSON."""
    if not isinstance(value, str):
        mistakes.add(path, f"expected text, got {_kind_of(value)}")
        return False
    if "\0" in value:
        mistakes.add(path, "holds a NUL character")
        return False
    if any("\ud800" <= char <= "\udfff" for char in value):
        mistakes.add(path, "holds half of a UTF-16 pair, which is not text")
        return False
    return True


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> Mapping[str, Any]:
    return {info.name: info for info in msgspec.structs.fields(kind)}


def _bare(kind: Any) -> Any:
    """Return the table type out of `Table | None`; other types as they are."""
    if get_origin(kind) in {Union, types.UnionType}:
        rest = [item for item in get_args(kind) if item is not type(None)]
        if len(rest) == 1 and isinstance(rest[0], type) and issubclass(rest[0], msgspec.Struct):
            return rest[0]
    return kind


def _suggest(key: str, kind: type[msgspec.Struct]) -> str:
    """Return a remedy: the key that was meant, or the table below this one that has it."""
    known = _fields(kind)
    if found := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return f"did you mean {found[0]}?"
    for name, info in known.items():
        below = _bare(info.type)
        if isinstance(below, type) and issubclass(below, msgspec.Struct) and key in _fields(below):
            return f"{key} belongs into the table {name}"
    return f"known here: {', '.join(sorted(known))}" if len(known) <= 12 else ""  # noqa: PLR2004  one line of text


def _nearest(value: object, kind: Any, error: str) -> str:
    choices = _choices(kind)
    if choices and isinstance(value, str):
        found = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        return f"did you mean {found[0]}?" if found else ""
    if isinstance(value, str) and re.search(r"Expected `(int|float)", error) and re.fullmatch(r"[0-9_.]+", value):
        return f"{value}, without quotes"
    if isinstance(value, int | float) and not isinstance(value, bool) and "Expected `str`" in error:
        return f'"{value}"'
    return ""


def _choices(kind: Any) -> tuple[str, ...]:
    return tuple(str(item) for item in get_args(kind)) if get_origin(kind) is Literal else ()


def _describe(kind: Any) -> str:
    """Return what a value of this type is, in the words of the manual."""
    if choices := _choices(kind):
        return f"one of {', '.join(choices)}"
    if get_origin(kind) is Annotated:
        base, meta = get_args(kind)[0], get_args(kind)[1]
        low, high = meta.ge, meta.le
        limits = f" from {low} to {high}" if high is not None else f" not below {low}"
        return _describe(base) + limits
    if get_origin(kind) in {Union, types.UnionType}:
        parts = [_describe(item) for item in get_args(kind) if item is not type(None)]
        return " or ".join(parts)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return "a table"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(kind, str(kind))


def _kind_of(value: object) -> str:
    """Return what a value is, without showing it: it may be a secret in the wrong place."""
    for kind, name in (
        (bool, "true or false"),
        (str, "text"),
        (int | float, "a number"),
        (list, "a list"),
        (dict, "a table"),
        (type(None), "null"),
    ):
        if isinstance(value, kind):
            return name
    return "a date or time"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float) and abs(value) < 1e15:  # noqa: PLR2004  longer numbers are not worth a line
        return str(value)
    if isinstance(value, str) and len(value) <= 40 and not looks_secret(value):  # noqa: PLR2004  one line of text
        return _quoted(value)
    return _kind_of(value)


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
