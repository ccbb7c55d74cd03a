"""What is asked of a log: which events. It tells whether one is meant; finding them quickly is for the index.

All conditions must hold; of one condition's values, any. Text is compared as it stands, but for hosts, whose case
does not count. Patterns are those of glob(7), where `*` stands for `/` too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from fnmatch import translate

import msgspec

from cloister.audit.event import Event
from cloister.audit.kept import severity
from cloister.audit.kinds import kinds

_GLOB = re.compile(r"[*?\[]")
FOREVER_NS = 2**63 - 1
MOST_SEVERE = 5


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """The conditions; an empty one asks for everything."""

    runs: tuple[str, ...] = ()
    """Ids of runs, or their beginnings followed by `*`."""
    agents: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    """Names of kinds, as `resolve` gives them."""
    severity: int = 1
    """At least so severe."""
    decisions: tuple[str, ...] = ()
    """`allowed`, `blocked`, `asked`."""
    paths: tuple[str, ...] = ()
    """Of a file, a program, or a socket."""
    hosts: tuple[str, ...] = ()
    """Names or addresses."""
    rules: tuple[str, ...] = ()
    since: int = 0
    """In nanoseconds since the epoch."""
    until: int = FOREVER_NS

    def test(self) -> Callable[[Event], bool]:
        """Return the test for one event."""
        parts: list[Callable[[Event], bool]] = []
        if self.since > 0 or self.until < FOREVER_NS:
            parts.append(lambda event: self.since <= event.time <= self.until)
        for values, word in (
            (self.runs, "run"),
            (self.agents, "agent"),
            (self.users, "user"),
            (self.kinds, "kind"),
            (self.decisions, "disposition"),
            (self.rules, "rule"),
        ):
            if values:
                parts.append(functools.partial(_has, one_of(values), word))
        if self.severity > 1:
            parts.append(lambda event: severity(event) >= self.severity)
        if self.paths:
            parts.append(functools.partial(_any, one_of(self.paths), paths_of))
        if self.hosts:
            parts.append(functools.partial(_any, one_of(tuple(host.lower() for host in self.hosts)), hosts_of))
        return lambda event: all(part(event) for part in parts)


def resolve(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of kinds for what people write: a name, a pattern, the part before the dot, or an OCSF class.

    Raises:
        KeyError: a word that means no kind.
    """
    found: list[str] = []
    for word in words:
        means = one_of((word, f"{word}.*"))
        names = [name for name, kind in kinds().items() if means(name) or str(kind.class_uid) == word]
        if not names:
            raise KeyError(word)
        found += names
    return tuple(dict.fromkeys(found))


def is_pattern(text: str) -> bool:
    """Tell whether a text holds a sign of glob(7)."""
    return _GLOB.search(text) is not None


def one_of(values: tuple[str, ...]) -> Callable[[str], bool]:
    """Return the test whether a text is one of these values or matches one of these patterns."""
    plain = frozenset(value for value in values if not is_pattern(value))
    patterns = [translate(value) for value in values if is_pattern(value)]
    if not patterns:
        return plain.__contains__
    match = re.compile("|".join(patterns)).match
    return lambda text: text in plain or match(text) is not None


def paths_of(event: Event) -> tuple[str, ...]:
    """Return the paths in an event."""
    return (
        event.process.path if event.process else "",
        event.file.path if event.file else "",
        event.file.target if event.file else "",
        event.endpoint.path if event.endpoint else "",
    )


def hosts_of(event: Event) -> tuple[str, ...]:
    """Return the hosts in an event."""
    if event.endpoint is None:
        return ()
    return event.endpoint.hostname.lower(), event.endpoint.ip


def _has(test: Callable[[str], bool], word: str, event: Event) -> bool:
    return test(getattr(event, word))


def _any(test: Callable[[str], bool], texts: Callable[[Event], tuple[str, ...]], event: Event) -> bool:
    return any(text and test(text) for text in texts(event))
