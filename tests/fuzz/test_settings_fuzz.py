"""Settings laid over any file of a home: the values are those meant, in both forms, and no key of a model stays."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import tomlkit
from hypothesis import example, given
from hypothesis import strategies as st

from cloister.plan.settings import merged, merged_models

NAMES = st.sampled_from(["a", "b", "c", "a b", "é", "x.y", "", "#"])
LEAVES = st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=6) | st.lists(st.integers(0, 9), max_size=3)
TABLES = st.recursive(
    st.dictionaries(NAMES, LEAVES, max_size=3), lambda inner: st.dictionaries(NAMES, LEAVES | inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
LINES = st.lists(
    st.sampled_from(
        ["[a]", "[a.b]", "[[a]]", "[[c]]", "[c.a]", "a = 1", "b = {a = 1}", "a.b = 2", "# words", "c = [1, # x\n 2]",
         "'x.y' = 1979-05-27", "", "b = '''x\ny'''", "[b]", "a.c.a = 1"]
    ), max_size=8,
).map("\n".join)  # fmt: skip


@given(TABLES, TABLES)
def test_both_forms_say_the_same(host: dict[str, Any], managed: dict[str, Any]) -> None:
    """What TOML says after merging is what JSON says."""
    data, complaint = merged(tomlkit.dumps(host).encode(), managed, "toml")
    assert complaint == ""
    assert tomllib.loads(data.decode()) == json.loads(merged(json.dumps(host).encode(), managed)[0])


@given(LINES, TABLES)
@example("[a.b]\n[c]\n[a]", {"a": {"b": {"c": 1}}})
def test_any_text_is_merged_or_named(text: str, managed: dict[str, Any]) -> None:
    """The policy's values stand whatever the home's file is, and what the home alone has stays where it is TOML."""
    data, complaint = merged(text.encode(), managed, "toml")
    found = tomllib.loads(data.decode())
    try:
        host = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assert complaint
        host = {}
    else:
        assert complaint == ""
    assert found == over(host, managed)


SECRET = "made-up-secret-value"
KEYS = st.sampled_from(["apiKey", "API_KEY", "api-key", "headers", "token", "Authorization", "password"])
HELD = {"apikey", "headers", "token", "authorization", "password"}


def planted(table: dict[str, Any]) -> dict[str, Any]:
    """Put a secret wherever a name says that there is one."""
    return {
        key: SECRET if key.casefold().replace("_", "").replace("-", "") in HELD else item for key, item in table.items()
    }


@given(st.binary(max_size=60))
def test_any_bytes_end_in_toml(data: bytes) -> None:
    """Nothing that a home may hold ends in an exception."""
    tomllib.loads(merged(data, {"a": {"b": 1}}, "toml")[0].decode())


ANY = st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | KEYS, inner, max_size=3).map(planted),
    max_leaves=10,
)


@given(ANY)
def test_no_key_stays_at_any_depth(value: Any) -> None:
    """Wherever in a list of models a key stands, it is not in what is shown."""
    data, _, _ = merged_models(json.dumps({"providers": {"a": value}}).encode(), {})
    assert SECRET not in data.decode()


def over(base: Any, managed: dict[str, Any]) -> dict[str, Any]:
    """Return what is meant by laying over, said once more."""
    result = dict(base) if isinstance(base, dict) else {}
    for key, value in managed.items():
        result[key] = over(result.get(key), value) if isinstance(value, dict) else value
    return result
