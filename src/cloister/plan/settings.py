"""Settings of a product: those of the policy laid over those of the home, as JSON or TOML. Pure.

The result is made anew at every start and shown read-only, so a setting that is taken out of the policy is gone with
the next run, and two runs never write the same file. It is never stored: the home's own settings may hold secrets.
In TOML the home's comments and order stay; that the result says what was meant is looked at before it is used.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from cloister.policy.secretscan import looks_secret

Form = Literal["json", "toml"]
_WITHHELD = frozenset(
    {"apikey", "key", "token", "secret", "password", "headers", "authorization", "cookie", "credentials"}
)
"""Names of what is no secret in its shape but in its use, without case, hyphens and underscores."""


def form_of(name: str) -> Form:
    """Return the form of a file of settings, which its name tells."""
    return "toml" if name.endswith(".toml") else "json"


def merged(host: bytes | None, managed: Mapping[str, Any], form: Form = "json") -> tuple[bytes, str]:
    """Return the file to show, and what is wrong with the home's; nothing, where it is fine or not there.

    Args:
        host: the home's file; None where there is none.
        managed: what the policy sets; tables are merged, everything else is replaced.
        form: of both files.
    """
    if form == "toml":
        return _merged_toml(host, managed)
    base, complaint = _object(host)
    return _json(_over(base, managed)), complaint


def merged_models(host: bytes | None, managed: Mapping[str, Any]) -> tuple[bytes, str, tuple[str, ...]]:
    """Return a product's list of model providers, what is wrong with the home's, and what of it was left out.

    The home's own providers stay, so that what they say of models is there. What holds a key, or looks like one, is
    left out: an agent's keys are the policy's affair. A provider of which nothing is left goes as a whole.
    """
    base, complaint = _object(host)
    kept, dropped = _without_secrets(base)
    providers = kept.get("providers")
    if isinstance(providers, dict):
        kept["providers"] = {name: one for name, one in providers.items() if one != {}}
    return _json(_over(kept, managed)), complaint, tuple(dropped)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode("ascii") + b"\n"


def _object(host: bytes | None) -> tuple[dict[str, Any], str]:
    if host is None:
        return {}, ""
    try:
        found = json.loads(host)
    except (ValueError, RecursionError):
        return {}, "is not JSON"
    return (found, "") if isinstance(found, dict) else ({}, "is JSON, but no object")


def _over(base: Mapping[str, Any], managed: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in managed.items():
        under = result.get(key)
        if isinstance(value, Mapping):
            result[key] = _over(under if isinstance(under, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def _without_secrets(base: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a document without what holds a secret, and the places of that, such as `providers.x.apiKey`."""
    dropped: list[str] = []

    def clean(value: Any, at: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: clean(item, (*at, key)) for key, item in value.items() if not withheld(key, item, at)}
        if isinstance(value, list):
            return [clean(item, at) for item in value if not withheld("", item, at)]
        return value

    def withheld(key: str, value: Any, at: tuple[str, ...]) -> bool:
        named = key.casefold().replace("_", "").replace("-", "") in _WITHHELD
        if named or looks_secret(key) or (isinstance(value, str) and looks_secret(value)):
            dropped.append(".".join((*at, "…" if looks_secret(key) else key)).removesuffix("."))
            return True
        return False

    return clean(base, ()), list(dict.fromkeys(dropped))


# --- TOML ----------------------------------------------------------------------------------------


def _merged_toml(host: bytes | None, managed: Mapping[str, Any]) -> tuple[bytes, str]:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    text, complaint = "", ""
    try:
        text = (host or b"").decode().replace("\r\n", "\n")
        wanted = _over(tomllib.loads(text), managed)
    except (ValueError, RecursionError):
        text, complaint, wanted = "", "is not TOML", _over({}, managed)
    try:
        document = tomlkit.parse(text)
        _lay_over(document, managed)
        shown = tomlkit.dumps(document)
        if tomllib.loads(shown) == wanted:
            return shown.encode(), complaint
    except (TOMLKitError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # what it cannot change in place it is given anew
    return tomlkit.dumps(wanted).encode(), complaint


def _lay_over(table: Any, managed: Mapping[str, Any]) -> None:
    """Set values in a document that keeps its comments."""
    for key, value in _plain_first(managed):
        if isinstance(value, Mapping) and isinstance(table.get(key), Mapping):
            _lay_over(table[key], value)
        else:
            table[key] = value


def _plain_first(managed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield tables last: what follows the head of a table belongs to it."""
    yield from ((key, value) for key, value in managed.items() if not isinstance(value, Mapping))
    yield from ((key, value) for key, value in managed.items() if isinstance(value, Mapping))
