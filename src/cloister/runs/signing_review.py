"""What can be said about keys before a run and after it: hosts out of reach for `check`, refusals for `why`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cloister.credentials.signing import SigningEvent
from cloister.credentials.ssh_known_hosts import SSH_PORT
from cloister.egress.addresses import Guard
from cloister.egress.decision import Target, allow_line, decide
from cloister.egress.hosts import parse_authority
from cloister.egress.rules import Ruleset
from cloister.policy.model import Agent
from cloister.runs.store import Store


class Unreachable(msgspec.Struct, frozen=True, kw_only=True):
    """A host that a key may log in to and egress does not let through."""

    credential: str
    place: str
    line: str
    """The entry of `egress.allow` that would."""


class SigningDenial(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was not signed, as often as it was not."""

    reason: str
    use: str
    key: str
    times: int
    explanation: str
    remedy: str


def unreachable(agent: Agent, rules: Ruleset, guard: Guard) -> Iterator[Unreachable]:
    """Yield the hosts of keys that no rule allows. Modes that ask or learn let them through in their own way."""
    if rules.mode != "deny":
        return
    for name, credential in agent.credentials.items():
        for text in credential.hosts if credential.keys and "ssh" in credential.uses else ():
            host, port = parse_authority(text, SSH_PORT)
            target = Target("connect", host, port)
            if not decide(rules, guard, target).allowed:
                yield Unreachable(credential=name, place=target.authority, line=allow_line(target))


def signing_denials(store: Store, run: str) -> list[SigningDenial]:
    """Return what was not signed in a run, one per reason and key, in the order in which they first came."""
    counts: dict[tuple[str, str], tuple[int, SigningEvent]] = {}
    for recorded in store.events(run):
        if recorded.get("event") != "signing" or recorded.get("verdict") == "allow":
            continue
        fields = {key: value for key, value in recorded.items() if key not in {"event", "time"}}
        event = msgspec.convert(fields, SigningEvent)
        count, first = counts.get((event.reason, event.key), (0, event))
        counts[event.reason, event.key] = (count + 1, first)
    return [
        SigningDenial(
            reason=one.reason, use=one.use, key=one.key, times=count, explanation=one.explanation, remedy=one.remedy
        )
        for count, one in counts.values()
    ]
