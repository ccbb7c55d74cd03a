"""From what a run tried to what its policy could say: the texts behind `cloister learn` and `cloister why`.

Proposals hold exact names and ports only: a wildcard is a person's decision. Nothing is
written here; the caller shows the diff.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cloister.egress.decision import Target, allow_line
from cloister.egress.events import EgressEvent
from cloister.egress.hosts import HostError, parse_host

_OPEN_BY_MODE = frozenset({"allowed-by-mode", "allowed-by-user"})
_NAMED_BY_NO_RULE = frozenset({"not-in-allowlist", "port-not-allowed", "local-name", "not-answered", "no-terminal"})
_PROPOSED = _NAMED_BY_NO_RULE - {"local-name"}
"""A name of the local network is opened by a person who writes it, never by accepting what an agent asked for: behind
an upstream proxy no address guard would judge it."""


class Reason(NamedTuple):
    """One line of `cloister why`: a place that was refused, how often, why, and the entry that would allow it."""

    host: str
    port: int
    reason: str
    times: int
    rule: str
    line: str
    """An `egress.allow` entry, or empty when a new entry would not help (a deny rule, an address, a bad spelling)."""
    request: str = ""
    """Method and path of the first such request, where both could be seen; never its query."""


def wanted(events: Iterable[EgressEvent]) -> tuple[str, ...]:
    """Return the `egress.allow` entries a run would have needed, sorted, each once.

    Taken are connections that only the mode or the user's answer allowed, whatever became of
    them, and those no rule named. Reserved, local and malformed hosts are left out.
    """
    entries = {
        line
        for event in events
        if (event.verdict == "allow" and _by_mode(event)) or event.reason in _PROPOSED
        if (line := _line(event))
    }
    return tuple(sorted(entries))


def propose(events: Iterable[EgressEvent], allow: Sequence[str], *, agent: str) -> str:
    """Return a unified diff of `allow` in the agent's table, or nothing when no entry is missing.

    Args:
        events: what the run recorded.
        allow: the present entries in their TOML spelling, as far as they have a short form.
        agent: whose table it is.
    """
    present = [f'"{entry}"' for entry in allow]
    missing = [line for line in wanted(events) if line not in present]
    if not missing:
        return ""
    name = f"[agents.{agent}.egress]"
    before, after = _table(name, present), _table(name, present + missing)
    return "\n".join(difflib.unified_diff(before, after, "policy", "proposed", lineterm="", n=len(after))) + "\n"


def why(events: Iterable[EgressEvent]) -> tuple[Reason, ...]:
    """Return the refusals of a run, one per place and reason, in the order in which they first came."""
    counts: dict[tuple[str, int, str], tuple[int, EgressEvent]] = {}
    for event in events:
        if event.verdict != "deny":
            continue
        key = (event.host, event.port, event.reason)
        count, first = counts.get(key, (0, event))
        counts[key] = (count + 1, first)
    return tuple(
        Reason(
            host,
            port,
            reason,
            count,
            first.rule,
            _line(first) if reason in _NAMED_BY_NO_RULE else "",
            f"{first.method} {first.path}" if first.method and first.path else "",
        )
        for (host, port, reason), (count, first) in counts.items()
    )


def _by_mode(event: EgressEvent) -> bool:
    """Say whether no rule allowed this: the event carries the mode in place of a rule, or the user's answer."""
    return event.reason in _OPEN_BY_MODE or not event.rule or event.rule.startswith("mode = ")


def _line(event: EgressEvent) -> str:
    """Return the entry for an event, or nothing when its host or port cannot stand in one."""
    try:
        host = parse_host(event.host)
    except HostError:
        return ""
    if not event.port or event.reason in {"proxy-status", "reserved-name"}:
        return ""
    return allow_line(Target(event.protocol, host, event.port))


def _table(name: str, entries: Sequence[str]) -> list[str]:
    """Return the lines of a table with only `allow` in it."""
    return [name, "allow = [", *(f"    {entry}," for entry in entries), "]"]
