"""The seccomp table as values: which system calls a sandbox refuses, why, and with which error.

The data is `seccomp_table.toml` beside this file; its head tells how to read it. Loading
checks every name against the numbers and constants, so that a misspelt system call is an
error of the table and never a hole in the filter. Not here: anything about BPF (`seccomp`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Literal

import msgspec

Arch = Literal["x86_64", "aarch64", "riscv64"]
Lift = Literal["", "nested", "ptrace", "netlink", "listeners"]

FULL_MASK = 0xFFFFFFFF


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all tables of the file share: frozen values, unknown keys refused."""


class Condition(Row, frozen=True, kw_only=True):
    """True when the masked low 32 bits of an argument are in `values` (or not in it, with `negated`)."""

    arg: int
    mask: int
    values: tuple[int, ...]
    negated: bool


class Rule(Row, frozen=True, kw_only=True):
    """Refuse `syscall` with `errno` when all conditions hold; no condition means always."""

    syscall: str
    errno: str
    when: tuple[Condition, ...] = ()


class Group(Row, frozen=True, kw_only=True):
    """Rules that share a reason and the policy key that lifts them."""

    name: str
    reason: str
    lift: Lift
    rules: tuple[Rule, ...]


class Machine(Row, frozen=True, kw_only=True):
    """One architecture: its AUDIT_ARCH value, the numbers that mean something, and the number of each call."""

    audit: int
    x32_bit: int
    known: tuple[tuple[int, int], ...]
    numbers: dict[str, int]


class Table(Row, frozen=True, kw_only=True):
    """The whole table, names resolved."""

    machines: dict[str, Machine]
    groups: tuple[Group, ...]
    errnos: dict[str, int]
    allowed: dict[str, str]


class RawCondition(Row, frozen=True, kw_only=True, rename={"in_": "in"}):
    """A condition as it is written, with names of constants."""

    arg: int
    mask: tuple[str, ...] = ()
    in_: tuple[str | int, ...] = ()
    not_in: tuple[str | int, ...] = ()


class RawRule(Row, frozen=True, kw_only=True):
    """A rule as it is written."""

    syscall: str
    when: tuple[RawCondition, ...]
    errno: str = "EPERM"


class _RawGroup(Row, frozen=True, kw_only=True):
    name: str
    reason: str
    errno: str = "EPERM"
    lift: Lift = ""
    syscalls: tuple[str, ...] = ()
    rules: tuple[RawRule, ...] = ()


class _RawArch(Row, frozen=True, kw_only=True):
    audit: int
    numbers: Literal["x86_64", "generic"]
    known: tuple[tuple[int, int], ...]
    x32_bit: int = 0


class _RawTable(Row, frozen=True, kw_only=True):
    constants: dict[str, int]
    errnos: dict[str, int]
    arches: dict[Arch, _RawArch]
    groups: tuple[_RawGroup, ...]
    allowed: dict[str, str]
    numbers: dict[str, tuple[int, int]]


def parse(text: str) -> Table:
    """Return the table written in `text`.

    Raises:
        ValueError: (msgspec.ValidationError among them) a key, name or value is wrong.
    """
    raw = msgspec.convert(tomllib.loads(text), _RawTable)
    groups = tuple(_group(group, raw) for group in raw.groups)
    named = {rule.syscall for group in groups for rule in group.rules}
    if wrong := named ^ raw.numbers.keys():
        raise ValueError(f"system calls without a number, or numbers without a rule: {', '.join(sorted(wrong))}")
    if wrong := {rule.errno for group in groups for rule in group.rules} - raw.errnos.keys():
        raise ValueError(f"unknown error names: {', '.join(sorted(wrong))}")
    if wrong := named & raw.allowed.keys():
        raise ValueError(f"both refused and allowed: {', '.join(sorted(wrong))}")
    machines: dict[str, Machine] = {name: _machine(arch, raw.numbers) for name, arch in raw.arches.items()}
    return Table(machines=machines, groups=groups, errnos=raw.errnos, allowed=raw.allowed)


@cache
def table() -> Table:
    """Return the table that ships with this package."""
    return parse(resources.files(__package__).joinpath("seccomp_table.toml").read_text(encoding="utf-8"))


def _machine(arch: _RawArch, numbers: dict[str, tuple[int, int]]) -> Machine:
    column = 0 if arch.numbers == "x86_64" else 1
    present = {name: pair[column] for name, pair in numbers.items() if pair[column] >= 0}
    outside = [name for name, nr in present.items() if not any(low <= nr <= high for low, high in arch.known)]
    if outside:
        raise ValueError(f"numbers outside the known ranges: {', '.join(outside)}")
    return Machine(audit=arch.audit, x32_bit=arch.x32_bit, known=arch.known, numbers=present)


def _group(group: _RawGroup, raw: _RawTable) -> Group:
    always = tuple(Rule(syscall=name, errno=group.errno) for name in group.syscalls)
    looking = tuple(
        Rule(syscall=rule.syscall, errno=rule.errno, when=tuple(condition(each, raw.constants) for each in rule.when))
        for rule in group.rules
    )
    if not always and not looking:
        raise ValueError(f"group {group.name} refuses nothing")
    return Group(name=group.name, reason=group.reason, lift=group.lift, rules=always + looking)


def condition(raw: RawCondition, constants: Mapping[str, int]) -> Condition:
    """Return a condition with the numbers that its names stand for.

    Raises:
        ValueError: a name is unknown, or it is no condition.
    """

    def value(name: str | int) -> int:
        number = constants.get(name) if isinstance(name, str) else name
        if number is None or not 0 <= number <= FULL_MASK:
            raise ValueError(f"{name} is not a constant of 32 bits")
        return number

    if bool(raw.in_) == bool(raw.not_in) or raw.arg not in range(6):
        raise ValueError("a condition has one argument of 0 to 5, and either `in` or `not_in`")
    mask = 0
    for name in raw.mask:
        mask |= value(name)
    values = tuple(sorted({value(name) for name in raw.in_ or raw.not_in}))
    return Condition(arg=raw.arg, mask=mask or FULL_MASK, values=values, negated=bool(raw.not_in))
