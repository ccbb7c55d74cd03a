"""Filters for programs that only work on files they were given: allowlists, where agents get a denylist (`seccomp`).

The data is `seccomp_narrow.toml` beside this file. Whatever is not listed answers ENOSYS, as on a kernel that lacks it.
For e2fsprogs and for the reader of guests' images, which parse what a hostile guest wrote.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Literal

import msgspec

from cloister.isolation.seccomp import ALLOW, ERRNO, Node, Return, append, encode, for_machine, machine_of, when
from cloister.isolation.seccomp_table import Condition, RawRule, Row, condition, table

Name = Literal["disk-tool", "disk-reader"]
"""`disk-tool`: loaded by bubblewrap around e2fsprogs. `disk-reader`: loaded by the reader itself."""


class _List(Row, frozen=True, kw_only=True):
    syscalls: tuple[str, ...]
    rules: tuple[RawRule, ...] = ()


class _Profile(Row, frozen=True, kw_only=True):
    name: Name
    reason: str
    syscalls: tuple[str, ...]
    rules: tuple[RawRule, ...] = ()


class Lists(Row, frozen=True, kw_only=True):
    """The file: what is common, and what each profile adds."""

    constants: dict[str, int]
    common: _List
    profiles: tuple[_Profile, ...]
    numbers: dict[str, tuple[int, int]]


@cache
def assemble_narrow(arch: str, name: Name) -> bytes:
    """Return the filter `name` for `arch` (as `uname -m` prints it) as an array of struct sock_filter.

    Raises:
        UnsupportedError: `seccomp-arch`, the numbers of this architecture's calls are not known.
    """
    machine = machine_of(table(), arch)
    absent = Return(ERRNO | table().errnos["ENOSYS"])
    column = 0 if arch == "x86_64" else 1
    found = lists()
    leaves: dict[int, Node] = {}
    for call, conditions in allowed(found, name).items():
        number = found.numbers[call][column]
        if number >= 0:
            leaves[number] = when(conditions, Return(ALLOW), absent)
    segments: list[tuple[int, Node]] = [(0, absent)]
    for number in sorted(leaves):
        append(segments, number, leaves[number])
        append(segments, number + 1, absent)
    return encode(for_machine(machine, segments, absent))


def allowed(found: Lists, name: Name) -> dict[str, tuple[Condition, ...]]:
    """Return the calls of a profile, each with what must hold; nothing where it is always allowed."""
    profile = next(profile for profile in found.profiles if profile.name == name)
    calls: dict[str, tuple[Condition, ...]] = dict.fromkeys((*found.common.syscalls, *profile.syscalls), ())
    for rule in (*found.common.rules, *profile.rules):
        calls[rule.syscall] = tuple(condition(each, found.constants) for each in rule.when)
    return calls


def parse(text: str) -> Lists:
    """Return the lists written in `text`.

    Raises:
        ValueError: (msgspec.ValidationError among them) a key, name or value is wrong.
    """
    found = msgspec.convert(tomllib.loads(text), Lists)
    common = _named(found.common)
    named = {call for profile in found.profiles for call in (*common, *_named(profile))}
    for profile in found.profiles:
        calls = [*common, *_named(profile)]
        if doubled := {call for call in calls if calls.count(call) > 1}:
            raise ValueError(f"named twice, so a rule would be lost: {', '.join(sorted(doubled))}")
    if wrong := named ^ found.numbers.keys():
        raise ValueError(f"system calls without a number, or numbers without a rule: {', '.join(sorted(wrong))}")
    for profile in found.profiles:
        allowed(found, profile.name)
    return found


def _named(one: _List | _Profile) -> list[str]:
    return [*one.syscalls, *(rule.syscall for rule in one.rules)]


@cache
def lists() -> Lists:
    """Return the lists that ship with this package."""
    return parse(resources.files(__package__).joinpath("seccomp_narrow.toml").read_text(encoding="utf-8"))
