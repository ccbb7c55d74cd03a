"""What a run was refused and what it would have needed, from its events: behind `why` and `learn`.

The texts of entries come from `egress/proposal.py`. Here they are held against the policy as it
is now, so that nothing is proposed that a rule covers already or that would not help.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable

import msgspec

from cloister.egress import proposal
from cloister.egress.addresses import Guard
from cloister.egress.decision import Target, decide
from cloister.egress.events import EgressEvent
from cloister.egress.hosts import parse_address, parse_authority
from cloister.egress.rules import Ruleset
from cloister.runs.store import Store

_HTTPS = 443


class Denial(msgspec.Struct, frozen=True, kw_only=True):
    """One place that was refused, as often as it was."""

    host: str
    port: int
    reason: str
    times: int
    rule: str
    line: str
    """The entry of `egress.allow` that would allow it; empty when none would."""
    remedy: str
    request: str = ""
    """Method and path of the first such request, where both could be seen."""


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """One entry a run would have needed; `obstacle` says why adding it would not help."""

    line: str
    obstacle: str = ""


def egress_events(store: Store, run: str) -> list[EgressEvent]:
    """Return the recorded egress events of a run, in order."""
    return [
        msgspec.convert({key: value for key, value in event.items() if key != "event"}, EgressEvent)
        for event in store.events(run)
        if event.get("event") == "egress"
    ]


def denials(events: Iterable[EgressEvent], agent: str) -> list[Denial]:
    """Return the refusals, one per place and reason, each with what to do about it."""
    return [
        Denial(
            host=one.host,
            port=one.port,
            reason=one.reason,
            times=one.times,
            rule=one.rule,
            line=one.line,
            remedy=_remedy(one, agent),
            request=one.request,
        )
        for one in proposal.why(events)
    ]


def _remedy(one: proposal.Reason, agent: str) -> str:
    table = f"[agents.{agent}.egress]"
    if one.line and _is_refused(one.host):
        return f"if you trust that machine: add {one.line} to allow and its address to private in {table}"
    if one.line:
        return f"add {one.line} to allow in {table}"
    if one.reason == "address-refused":
        return f"if you trust that machine: add its address to private in {table}"
    if one.reason == "credential-not-for-this-request":
        return f"add the method or path to inject in [agents.{agent}.{one.rule}], if it shall have it"
    if one.rule:
        return f"change the rule {one.rule}"
    return ""


def _is_refused(host: str) -> bool:
    """Tell whether a host is an address in a range that is refused unless `private` lifts it."""
    address = parse_address(host)
    return address is not None and Guard().check(address) is not None


def wishes(events: Iterable[EgressEvent], rules: Ruleset, guard: Guard) -> list[Wish]:
    """Return the entries a run would have needed and the policy does not have, sorted.

    Args:
        events: what the run recorded.
        rules: the agent's rules as they are now.
        guard: judges addresses.
    """
    strict = rules._replace(mode="deny")
    found = []
    for line in proposal.wanted(events):
        entry = next(iter(tomllib.loads(f"entry = {line}").values()))
        host, port = parse_authority(entry, _HTTPS)
        verdict = decide(strict, guard, Target("connect", host, port))
        if verdict.allowed:
            continue
        obstacle = ""
        if verdict.reason == "denied-by-rule":
            obstacle = f"a deny rule names it: {verdict.rule}"
        elif host.address is not None and (refusal := guard.check(host.address)):
            obstacle = f"{refusal.network} is refused, {refusal.why}: it would have to stand in private as well"
        found.append(Wish(line=line, obstacle=obstacle))
    return found
