"""The model as documentation: a JSON Schema, and the tables and keys with their manual text.

The text of a key is the docstring below its attribute in `model.py`, read from the source
with `ast`, since Python keeps no docstrings of attributes. Nothing is written down twice.
JSON Schema: draft 2020-12, as msgspec makes it.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from cloister.policy import injection, login, model, model_llm, services


class KeyText(NamedTuple):
    """One key of a table, as the manual shows it."""

    name: str
    kind: str
    """Its type in the words of the manual."""
    default: str
    """Its default as TOML, empty where it has none."""
    text: str
    """The docstring, on one line."""


class TableText(NamedTuple):
    """One table of the policy file, as the manual shows it."""

    header: str
    """`[agents.NAME.limits]`, or empty for the top of the file."""
    text: str
    keys: tuple[KeyText, ...]


TABLES: tuple[type[msgspec.Struct], ...] = (
    model.Policy,
    model.Agent,
    model.Workspace,
    model.Filesystem,
    model.Egress,
    model.EgressRule,
    model.Credential,
    injection.Injection,
    model.Identity,
    model.Llm,
    model.Limits,
    model.Hardening,
    model.AgentSandbox,
    model.Unit,
    model.MicroVm,
    model.Provider,
    model.User,
    services.Service,
    services.ServiceModel,
    services.Channels,
    services.Telegram,
    services.Auth,
    services.Routing,
    services.Queue,
    services.Documents,
    services.Skill,
    services.ServicePlugin,
    services.Tools,
    services.ServiceSecret,
    services.Instance,
    model.MicroVms,
    model.Images,
    model.Audit,
    model.Ledger,
    model.Project,
    model.Preset,
    login.Login,
)
"""Every table, in the order of the manual."""


def json_schema(kind: type[msgspec.Struct] = model.Policy) -> dict[str, Any]:
    """Return the JSON Schema of a policy (or preset, or project file), with the manual's text as descriptions."""
    schema = msgspec.json.schema(kind)
    for name, definition in schema.get("$defs", {}).items():
        texts = docstrings().get(name, {})
        for key, shape in definition.get("properties", {}).items():
            if key in texts:
                shape["description"] = texts[key]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"Cloister {kind.__name__.lower()} file"
    return schema


def tables() -> tuple[TableText, ...]:
    """Return every table of the file with its keys."""
    return tuple(_table(kind) for kind in TABLES)


@functools.cache
def docstrings() -> Mapping[str, Mapping[str, str]]:
    """Return the docstring of every attribute of the model, by class and name, each on one line."""
    found: dict[str, dict[str, str]] = {}
    for node in (
        node
        for source in (injection, services, login, model_llm, model)
        for node in ast.parse(inspect.getsource(source)).body
    ):
        if not isinstance(node, ast.ClassDef):
            continue
        texts = found.setdefault(node.name, {})
        for base in node.bases:
            texts.update(found.get(base.id, {}) if isinstance(base, ast.Name) else {})
        for before, after in zip(node.body, node.body[1:], strict=False):
            if not isinstance(before, ast.AnnAssign) or not isinstance(before.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                texts[before.target.id] = " ".join(str(after.value.value).split())
    return found


def _table(kind: type[msgspec.Struct]) -> TableText:
    text = " ".join((kind.__doc__ or "").split())
    header, _, rest = text.partition(": ")
    if not header.startswith("`["):
        header, rest = "", text
    texts = docstrings()[kind.__name__]
    shapes = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
    keys = tuple(
        KeyText(info.name, _kind(shapes[info.name]), _default(info), texts.get(info.name, ""))
        for info in msgspec.structs.fields(kind)
    )
    return TableText(header.strip("`"), rest[:1].upper() + rest[1:], keys)


def _kind(shape: Mapping[str, Any]) -> str:
    """Return a JSON Schema type in plain words."""
    if "enum" in shape:
        return " | ".join(f'"{value}"' for value in shape["enum"])
    if "anyOf" in shape:
        kinds = [_kind(each) for each in shape["anyOf"]]
        return " or ".join(kind for kind in kinds if kind != "null")
    if "$ref" in shape or "allOf" in shape:
        return "table"
    kind = shape.get("type", "table")
    if kind == "array":
        return f"list of {_kind(shape['items'])}"
    if kind == "object":
        values = shape.get("additionalProperties")
        if not isinstance(values, Mapping):
            return "table"
        return "tables, by name" if _kind(values) == "table" else f"table of {_kind(values)}"
    return {"string": "text", "integer": "whole number", "boolean": "true | false"}.get(str(kind), str(kind))


def _default(info: Any) -> str:
    """Return a default as TOML; tables, empty lists and None need no mention."""
    value = info.default
    if value is msgspec.NODEFAULT or value is None or value in ("", ()) or isinstance(value, msgspec.Struct):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
