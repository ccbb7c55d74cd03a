"""When two listings of the packet filter are the same, and when they are not."""

import json
from copy import deepcopy
from typing import Any

import pytest

from cloister.errors import StepError
from cloister.host.firewall import digest

AGENTS = [[1900000000, {"goto": {"target": "closed"}}], [1900000001, {"goto": {"target": "internet0"}}]]
HOOK = {"name": "output", "handle": 4, "hook": "output", "prio": 0, "policy": "accept"}
LOOKED_UP = {"vmap": {"key": {"meta": {"key": "skuid"}}, "data": "@agents"}}
LISTED: dict[str, Any] = {
    "nftables": [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "inet", "name": "cloister", "handle": 2}},
        {"chain": HOOK},
        {"counter": {"name": "refused_1900000000", "handle": 5, "packets": 0, "bytes": 0}},
        {"map": {"name": "agents", "handle": 7, "elem": AGENTS}},
        {"rule": {"chain": "refuse", "handle": 11, "expr": [{"counter": {"packets": 3, "bytes": 9}}, {"drop": None}]}},
        {"rule": {"chain": "output", "handle": 12, "expr": [LOOKED_UP]}},
        {"rule": {"chain": "output", "handle": 13, "expr": [{"goto": {"target": "refuse"}}]}},
    ]
}


def _digest(value: Any) -> str:
    return digest(json.dumps(value).encode())


def test_what_changes_by_itself_does_not_count() -> None:
    """Handles, counts, the order of a map's elements and of objects, and nft's version are no change."""
    other = deepcopy(LISTED)
    items = other["nftables"]
    items[0]["metainfo"]["version"] = "1.1.3"
    items[3]["counter"].update(packets=17, bytes=1020, handle=55)
    items[4]["map"]["elem"].reverse()
    items[5]["rule"].update(handle=99, expr=[{"counter": {"packets": 4, "bytes": 10}}, {"drop": None}])
    items[1], items[2] = items[2], items[1]

    assert _digest(other) == _digest(LISTED)


@pytest.mark.parametrize(
    "change",
    [
        lambda items: items[1]["table"].update(flags=["dormant"]),
        lambda items: items[2]["chain"].update(prio=10),
        lambda items: items[2]["chain"].update(policy="drop"),
        lambda items: items[4]["map"]["elem"].pop(),
        lambda items: items[4]["map"]["elem"].append([1900000077, {"accept": None}]),
        lambda items: items[5]["rule"]["expr"].insert(0, {"accept": None}),
        lambda items: items.insert(6, {"rule": {"chain": "output", "expr": [{"accept": None}]}}),
        lambda items: items.append({"chain": {"name": "more"}}),
        lambda items: items.pop(6),
        lambda items: items.insert(6, items.pop(7)),
    ],
)
def test_every_change_of_meaning_counts(change: Any) -> None:
    """A switched off table, another priority or policy, a missing or added element, rule or chain, another order."""
    other = deepcopy(LISTED)
    change(other["nftables"])

    assert _digest(other) != _digest(LISTED)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"nft: broken", b'{"nftables": [3]}', b"[" * 100_000])
def test_what_is_no_listing_is_an_error(text: bytes) -> None:
    """A cut or foreign answer is never taken for a table."""
    with pytest.raises(StepError, match="cannot be read"):
        digest(text)
