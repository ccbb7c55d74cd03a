"""Settings of the policy over those of the home."""

from __future__ import annotations

import json

import pytest

from cloister.plan.settings import merged


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
