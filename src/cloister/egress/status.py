"""What an agent may know about its own limits: the answer to `GET http://cloister.internal/`."""

from __future__ import annotations

import msgspec

from cloister.egress.rules import Ruleset

_MODES = {
    "deny": "only the hosts in allow are reachable",
    "ask": "hosts outside allow are put to the user, and the request waits for the answer",
    "learn": "public hosts are reachable and recorded",
    "internet": "public hosts are reachable",
}


class Status(msgspec.Struct, frozen=True):
    """The JSON body; keys are part of the interface."""

    run: str
    agent: str
    mode: str
    meaning: str
    allow: list[str]
    deny: list[str]
    note: str


def status_body(run: str, rules: Ruleset) -> bytes:
    """Return the JSON text for one run; it holds rules, never secrets."""
    note = "Private networks, cloud metadata and the host itself are refused. Refusals are HTTP 403 with a JSON body."
    allow, deny = rules.allow.describe(), rules.deny.describe()
    return msgspec.json.encode(Status(run, rules.agent, rules.mode, _MODES[rules.mode], allow, deny, note))
