"""Settings of the policy over those of the home."""

from __future__ import annotations

import json
import tomllib

import pytest

from cloister.plan.settings import form_of, merged, merged_models


def test_tables_are_merged_and_all_else_is_replaced() -> None:
    """Recursively; lists are replaced whole; what the home alone has stays."""
    host = {"a": {"x": 1, "y": {"p": 1}}, "list": [1, 2, 3], "own": True, "was": {"a": "table"}, "is": 1}
    managed = {"a": {"y": {"q": 2}, "z": 3}, "list": [9], "was": "text", "is": {"a": "table"}}
    data, complaint = merged(json.dumps(host).encode(), managed)
    assert json.loads(data) == {
        "a": {"x": 1, "y": {"p": 1, "q": 2}, "z": 3}, "list": [9], "own": True, "was": "text", "is": {"a": "table"},
    }  # fmt: skip
    assert complaint == ""
    assert merged(json.dumps(dict(reversed(host.items()))).encode(), managed)[0] == data


@pytest.mark.parametrize("host", [b"{", b"", b"[1]", b"\xff", b"1", b"[" * 100_000, b'{"a": 1,}'])
def test_settings_that_are_none_are_named_and_the_policys_stand(host: bytes) -> None:
    """Flaw PF13: settings that could not be read became nothing, and nobody was told."""
    data, complaint = merged(host, {"managed": True})
    assert json.loads(data) == {"managed": True}
    assert "JSON" in complaint


def test_without_settings_of_the_home_there_is_nothing_to_complain_of() -> None:
    """The policy's stand alone."""
    assert merged(None, {"b": 1, "a": "\u00e4"}) == (b'{\n  "a": "\\u00e4",\n  "b": 1\n}\n', "")


CONFIG = b"""\
# mine
model = "host" # of the home

approval = "never"

[mcp.files] # a tool
command = "x"
args = ["a", # why
        "b"]

[[hooks]]
name = "one"
[[hooks]]
name = "two"

[tui]
theme = "dark"
inline = { a = 1, b = { c = 2 } }
"""


def test_toml_keeps_comments_and_order() -> None:
    """Tables are merged, everything else is replaced, and what the home wrote beside it stays where it was."""
    managed = {
        "model": "managed", "new": True, "tui": {"theme": "light", "inline": {"b": {"d": 3}}}, "fresh": {"a": {"b": 1}},
        "hooks": [{"name": "policy"}],
    }  # fmt: skip
    data, complaint = merged(CONFIG, managed, "toml")
    assert complaint == ""
    assert tomllib.loads(data.decode()) == {
        "model": "managed", "new": True, "approval": "never", "mcp": {"files": {"command": "x", "args": ["a", "b"]}},
        "hooks": [{"name": "policy"}], "fresh": {"a": {"b": 1}},
        "tui": {"theme": "light", "inline": {"a": 1, "b": {"c": 2, "d": 3}}},
    }  # fmt: skip
    text = data.decode()
    assert all(comment in text for comment in ("# mine", "# a tool", "# why"))
    assert text.index("approval") < text.index("[mcp.files]") < text.index("[tui]")
    assert merged(CONFIG, {}, "toml")[0] == CONFIG


@pytest.mark.parametrize("host", [b"= 1", b"[a]\n[a]", b"\xff", b"a = 1\na = 2", b"x = " + b"[" * 100_000, b'{"a": 1}'])
def test_toml_that_is_none_is_named_and_the_policys_stands(host: bytes) -> None:
    """As for JSON; a home whose file cannot be read does not get rid of the policy's."""
    data, complaint = merged(host, {"managed": {"a": 1}}, "toml")
    assert tomllib.loads(data.decode()) == {"managed": {"a": 1}}
    assert complaint == "is not TOML"


@pytest.mark.parametrize(
    "host",
    ["[a.b]\nx = 1\n[c]\ny = 1\n[a]\nz = 1\n", "a.b = 1\na.c = 2\n", "[[a]]\n[a.b]\nx = 1\n",
     "a = {}\r\n[b]\r\nc = 1\r\n", ""],
)  # fmt: skip
def test_what_cannot_be_changed_in_place_says_the_same_anew(host: str) -> None:
    """Dotted keys, tables out of order, arrays of tables: whatever becomes of comments, the values are those meant."""
    managed = {"a": {"b": {"x": 2}, "n": 1}, "b": {"c": 3}, "c": {"y": [1, {"z": 2}]}}
    base = tomllib.loads(host)
    data, complaint = merged(host.encode(), managed, "toml")
    assert complaint == ""
    assert tomllib.loads(data.decode()) == json.loads(merged(json.dumps(base).encode(), managed)[0])


def test_the_form_is_told_by_the_name() -> None:
    """A file of settings is TOML where its name says so."""
    assert (form_of(".codex/config.toml"), form_of(".pi/agent/settings.json"), form_of(".tool/rc")) == (
        "toml", "json", "json",
    )  # fmt: skip


MODELS = {
    "providers": {
        "own": {
            "baseUrl": "http://own.example/v1", "api": "openai-completions", "apiKey": "made-up",
            "headers": {"X-Auth": "made-up-header"}, "models": [{"id": "m", "headers": {"a": "made-up-too"}}],
        },
        "anthropic": {"baseUrl": "https://elsewhere.example", "api_key": "!cat ~/secret", "compat": {"a": True}},
        "bare": {"apiKey": "OPENAI_API_KEY"},
        "shaped": {"baseUrl": "https://u:hunter2hunter2@x.example", "name": "sk-" + "a1" * 20},
        "sk-" + "b2" * 20: {"baseUrl": "http://x"},
    }
}  # fmt: skip


def test_models_of_the_home_come_without_their_keys() -> None:
    """Its providers stay, the policy's lie over them, and what is or looks like a key is not there, and named."""
    managed = {"providers": {"anthropic": {"baseUrl": "http://ours"}, "cloister": {"apiKey": "$CLOISTER_MODEL_KEY"}}}
    data, complaint, dropped = merged_models(json.dumps(MODELS).encode(), managed)
    assert json.loads(data)["providers"] == {
        "own": {"baseUrl": "http://own.example/v1", "api": "openai-completions", "models": [{"id": "m"}]},
        "anthropic": {"baseUrl": "http://ours", "compat": {"a": True}},
        "cloister": {"apiKey": "$CLOISTER_MODEL_KEY"},
    }
    assert complaint == ""
    assert {
        "providers.own.apiKey",
        "providers.own.headers",
        "providers.own.models.headers",
        "providers.bare.apiKey",
    } < {*dropped}
    assert not any("sk-" in name or "hunter2" in name for name in dropped)


@pytest.mark.parametrize("host", [b"{", b"[]", b"// a comment\n{}"])
def test_models_that_cannot_be_read_are_the_policys_alone(host: bytes) -> None:
    """Nothing of what is not understood is shown."""
    data, complaint, dropped = merged_models(host, {"providers": {}})
    assert (json.loads(data), dropped) == ({"providers": {}}, ())
    assert "JSON" in complaint
