"""Rules of detections, from tables to tests: those that come with Cloister (`rules.toml`) and those of a policy.

A rule is checked as a whole and every mistake is told with its place, like those of a policy. What a rule says about
one event is decided here; what it says about several, in time, is `detect`.
"""

from __future__ import annotations

import functools
import importlib.resources
import os
import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from fnmatch import translate
from posixpath import normpath
from typing import NamedTuple

import msgspec

from cloister.audit.event import Event, Process
from cloister.audit.kinds import kinds
from cloister.audit.question import resolve
from cloister.errors import PolicyError, Problem
from cloister.policy.model import Audit, Conditions, DetectionRule
from cloister.policy.units import parse_duration
from cloister.policy.values import check_name

GRADES = ("informational", "low", "medium", "high", "critical")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LONGEST = 512
_LONGEST_TEXT = 2048
_MOST_PATTERNS = 256
_MOST_RULES = 256
_CACHED_TEXTS = 8192
Test = Callable[[Event], bool]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    rules: tuple[DetectionRule, ...]


class Compiled(NamedTuple):
    """One rule, ready to be asked."""

    rule: DetectionRule
    kinds: frozenset[str]
    test: Test
    within_ns: int
    every_ns: int
    after_kinds: frozenset[str]
    after: Test | None

    @property
    def severity(self) -> int:
        """OCSF severity_id."""
        return GRADES.index(self.rule.severity) + 1


@functools.cache
def shipped() -> tuple[DetectionRule, ...]:
    """Return the rules that come with Cloister, as they are written."""
    text = importlib.resources.files("cloister.audit").joinpath("rules.toml").read_bytes()
    return msgspec.toml.decode(text, type=_File).rules


def rules_of(audit: Audit) -> tuple[Compiled, ...]:
    """Return the rules in force under a policy.

    Raises:
        PolicyError: `policy-invalid`, with every mistake.
    """
    own = {rule.name for rule in shipped()}
    problems = [
        Problem(
            f"no detection that comes with Cloister is called {name!r}", f"audit.detections.{name}", _near(name, own)
        )
        for name in audit.detections
        if name not in own
    ]
    if len(audit.rules) > _MOST_RULES:
        problems.append(Problem(f"more than {_MOST_RULES} rules", "audit.rules", "leave some out"))
    seen = set(own)
    for place, rule in enumerate(audit.rules):
        problems += list(_mistakes(rule, f"audit.rules[{place}]", seen))
        seen.add(rule.name)
    if problems:
        raise PolicyError(problems)
    active = [_chosen(rule, audit) for rule in shipped() if audit.detections.get(rule.name) != "off"]
    return tuple(compiled(rule) for rule in (*active, *audit.rules))


def compiled(rule: DetectionRule) -> Compiled:
    """Return a rule, ready to be asked; it must be one without mistakes."""
    after = rule.after
    return Compiled(
        rule=rule,
        kinds=frozenset(resolve(rule.kinds)),
        test=_test(rule),
        within_ns=parse_duration(rule.within) * 1_000_000_000,
        every_ns=parse_duration(rule.every) * 1_000_000_000,
        after_kinds=frozenset(resolve(after.kinds)) if after else frozenset(),
        after=_test(after) if after else None,
    )


def _chosen(rule: DetectionRule, audit: Audit) -> DetectionRule:
    action = audit.detections.get(rule.name)
    return msgspec.structs.replace(rule, action=action) if action else rule


def _mistakes(rule: DetectionRule, where: str, taken: set[str]) -> Iterator[Problem]:
    try:
        check_name(rule.name)
    except ValueError as error:
        yield Problem(str(error), f"{where}.name")
    if rule.name in taken:
        remedy = f'another name; [audit.detections] {rule.name} = "off" switches the one that comes with Cloister off'
        yield Problem(f"there is a rule {rule.name!r} already", f"{where}.name", remedy)
    for key in ("within", "every"):
        try:
            parse_duration(getattr(rule, key))
        except ValueError as error:
            yield Problem(str(error), f"{where}.{key}")
    yield from _conditions(rule, where)
    if rule.after:
        yield from _conditions(rule.after, f"{where}.after")


def _conditions(held: Conditions, where: str) -> Iterator[Problem]:
    if not held.kinds:
        yield Problem("a rule says which events it is about", f"{where}.kinds", 'kinds = ["file.opened"]')
    for kind in held.kinds:
        try:
            names = resolve((kind,))
        except KeyError:
            yield Problem(f"no event is of the kind {kind!r}", f"{where}.kinds", _near(kind, set(kinds())))
            continue
        if any(name.startswith(("detection.", "log.head")) for name in names):
            yield Problem("a detection is not about detections, nor about heads", f"{where}.kinds", "other kinds")
    lists = {name: getattr(held, name) for name in held.__struct_fields__ if name in _PATTERNS} | {
        f"details.{name}": patterns for name, patterns in held.details.items()
    }
    for name, patterns in lists.items():
        if len(patterns) > _MOST_PATTERNS:
            yield Problem(f"more than {_MOST_PATTERNS} patterns", f"{where}.{name}", "split the rule")
        for pattern in patterns:
            if not pattern or len(pattern) > _LONGEST:
                yield Problem(f"a pattern has 1 to {_LONGEST} characters", f"{where}.{name}")


_PATTERNS = frozenset(
    {"agents", "users", "paths", "not_paths", "hosts", "not_hosts", "programs", "not_programs", "arguments", "reasons"}
)


def _near(name: str, known: set[str]) -> str:
    close = get_close_matches(name, sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(sorted(known))}"


def path_gate(rules: Iterable[Compiled], kind: str) -> Callable[[str], bool] | None:
    """Return the test for paths that some rule may mean in events of a kind; None where a rule asks for no path."""
    wanted: list[Conditions] = [rule.rule for rule in rules if kind in rule.kinds]
    wanted += [rule.rule.after for rule in rules if rule.rule.after and kind in rule.after_kinds]
    if not wanted or not all(held.paths for held in wanted):
        return None
    return _any_of(tuple(dict.fromkeys(path for held in wanted for path in held.paths)), path=True)


# --- one event --------------------------------------------------------------------------------


def _test(held: Conditions) -> Test:
    """Return the test for everything in a condition but the kind, the cheapest first."""
    parts: list[Test] = []
    if held.decisions:
        parts.append(lambda event: event.disposition in held.decisions)
    if held.failed is not None:
        parts.append(lambda event: (event.error != 0) == held.failed)
    if held.writes is not None:
        parts.append(lambda event: _writes(event) == held.writes)
    if held.ports:
        parts.append(lambda event: event.endpoint is not None and event.endpoint.port in held.ports)
    for patterns, texts, wanted in (
        (held.agents, lambda event: (event.agent,), True),
        (held.users, lambda event: (event.user,), True),
        (held.reasons, lambda event: (event.reason,), True),
        (held.hosts, _hosts, True),
        (held.not_hosts, _hosts, False),
        (held.programs, _programs, True),
        (held.not_programs, _programs, False),
        (held.paths, _files, True),
        (held.not_paths, _files, False),
        (held.arguments, _arguments, True),
    ):
        if patterns:
            path = texts in (_files, _programs)
            parts.append(functools.partial(_matches, _any_of(patterns, path=path), texts, wanted))
    for name, patterns in held.details.items():
        parts.append(functools.partial(_detail, _any_of(patterns), tuple(name.split("|"))))
    return lambda event: all(part(event) for part in parts)


def _any_of(patterns: tuple[str, ...], *, path: bool = False) -> Callable[[str], bool]:
    """Return the test whether a text matches one of the patterns; answers are kept, in a bounded number."""
    below = [_bare(pattern) for pattern in patterns if path and pattern[0] not in "/*"]
    whole = [_bare(pattern) for pattern in patterns if not path or pattern[0] in "/*"]
    # One beginning for all that match below any directory: ten times faster than each with its own.
    parts = ([f".*/(?:{'|'.join(below)})"] if below else []) + whole
    match = re.compile(f"(?s:{'|'.join(parts)})").fullmatch
    return functools.lru_cache(maxsize=_CACHED_TEXTS)(lambda text: match(text) is not None)


def _bare(pattern: str) -> str:
    """Return a pattern as a regular expression, without the frame of `fnmatch.translate`.

    What that makes never looks twice for what stands between two `*`: a hostile text costs no more than a long one.
    """
    return translate(pattern).removeprefix("(?s:").removesuffix(r")\Z").removesuffix(r")\z")


def _matches(
    test: Callable[[str], bool], texts: Callable[[Event], tuple[str, ...]], wanted: bool, event: Event
) -> bool:
    return any(test(text) for text in texts(event) if text) is wanted


def _detail(test: Callable[[str], bool], names: tuple[str, ...], event: Event) -> bool:
    return any(name in event.details and test(str(event.details[name])) for name in names)


def _hosts(event: Event) -> tuple[str, ...]:
    return (event.endpoint.hostname.lower(), event.endpoint.ip) if event.endpoint else ()


def _files(event: Event) -> tuple[str, ...]:
    return (plain(event.file.path), plain(event.file.target)) if event.file else ()


def _programs(event: Event) -> tuple[str, ...]:
    return (plain(event.process.path),) if event.process else ()


def _arguments(event: Event) -> tuple[str, ...]:
    return (command_line(event.process),) if event.process else ()


def command_line(process: Process) -> str:
    """Return the arguments of a process in one text, of bounded length."""
    return " ".join(process.cmd_line)[:_LONGEST_TEXT]


def plain(path: str) -> str:
    """Return a path without detours by `.`, `..` and doubled slashes, and its end alone where it is very long."""
    if "//" in path or "/." in path:
        path = normpath(path)
    return path if len(path) <= _LONGEST_TEXT else path[-_LONGEST_TEXT:]


def _writes(event: Event) -> bool:
    if event.kind != "file.opened":
        return event.kind.startswith("file.")
    return event.file is not None and bool(event.file.flags & _WRITING)
