"""Seccomp filters as bytes: from the table to classic BPF, without libseccomp and without a machine.

A filter is a decision tree: first the architecture, then a binary search over the system call
number, and only in the leaves the arguments. This order is what makes it cheap. Since Linux 5.11
the kernel runs a new filter once per number with the arguments unknown, and remembers the numbers
that are allowed without looking at any (kernel/seccomp.c, seccomp_cache_prepare); for those, which
are nearly all, the filter never runs again. Older kernels run about ten instructions.

Not here: which calls are refused and why (`seccomp_table`), and handing the bytes to bubblewrap
(`--seccomp FD` takes exactly these: an array of struct sock_filter).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

from cloister.errors import UnsupportedError
from cloister.isolation.seccomp_table import FULL_MASK, Condition, Group, Machine, Rule, Table, table

# Classic BPF, linux/bpf_common.h; struct seccomp_data and the return values, linux/seccomp.h.
LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
JUMP = 0x05  # BPF_JMP | BPF_JA
JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
JUMP_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K
OFFSET_NUMBER = 0
OFFSET_ARCH = 4
OFFSET_ARGS = 16
ALLOW = 0x7FFF0000
ERRNO = 0x00050000
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS
FAR = 255  # conditional jumps count in one byte


class Return(NamedTuple):
    """A leaf: the verdict."""

    value: int


class Load(NamedTuple):
    """Read 32 bits of struct seccomp_data at `offset`, keep the bits of `mask`, go on with `then`."""

    offset: int
    mask: int
    then: Node


class Test(NamedTuple):
    """Compare what was loaded: to `yes` when it equals (or is at least) one of `values`, else to `no`."""

    jump: int
    values: tuple[int, ...]
    yes: Node
    no: Node


Node: TypeAlias = Return | Load | Test
Instruction: TypeAlias = tuple[int, int, int, int]


@cache
def assemble(
    arch: str, *, nested: bool = False, ptrace: bool = False, netlink: bool = True, listeners: bool = False
) -> bytes:
    """Return the filter for `arch` (as `uname -m` prints it) as an array of struct sock_filter.

    The first three flags are those of `[agents.NAME.hardening]`; with `listeners` the sandbox's first process puts a
    filter over each command that tells of calls, and refuses listeners of theirs itself (host/shim/notify.c). Little
    endian, as all three architectures are.

    Raises:
        UnsupportedError: `seccomp-arch`, there is no table for this architecture.
    """
    data = table()
    active = active_groups(data, nested=nested, ptrace=ptrace, netlink=netlink, listeners=listeners)
    return encode(_filter(machine_of(data, arch), data, active))


def describe(arch: str, *, nested: bool = False, ptrace: bool = False, netlink: bool = True) -> list[str]:
    """Return one line per group for `cloister plan`: what is refused and why, or which opt-out lifted it.

    Raises:
        UnsupportedError: `seccomp-arch`, there is no table for this architecture.
    """
    data = table()
    machine = machine_of(data, arch)
    active = active_groups(data, nested=nested, ptrace=ptrace, netlink=netlink)
    lines = [f"seccomp for {arch}: refuses with an error number, never kills; foreign ABIs and unknown numbers too"]
    for group in data.groups:
        calls = ", ".join(dict.fromkeys(_shown(rule) for rule in group.rules if rule.syscall in machine.numbers))
        if not calls:
            continue
        if group in active:
            lines.append(f"refuse {group.name}: {calls}. {group.reason}")
        elif group.lift != "netlink":  # netlink is on by default: no opt-out, nothing to tell
            lines.append(f"LIFTED by hardening.{group.lift}: {group.name}: {calls}")
    return lines


def active_groups(
    data: Table, *, nested: bool, ptrace: bool, netlink: bool, listeners: bool = False
) -> tuple[Group, ...]:
    """Return the groups that stay when the lifts of the policy are taken out, in the order of the table."""
    flags = {"nested": nested, "ptrace": ptrace, "netlink": netlink, "listeners": listeners}
    lifted = {name for name, on in flags.items() if on}
    return tuple(group for group in data.groups if group.lift not in lifted)


def machine_of(data: Table, arch: str) -> Machine:
    """Return what is known of an architecture.

    Raises:
        UnsupportedError: `seccomp-arch`, nothing is.
    """
    machine = data.machines.get(arch)
    if machine is None:
        raise UnsupportedError(
            "seccomp-arch",
            f"there is no system call table for {arch}",
            remedy=f"run on one of: {', '.join(sorted(data.machines))}",
        )
    return machine


def _shown(rule: Rule) -> str:
    return f"{rule.syscall} (by argument, {rule.errno})" if rule.when else f"{rule.syscall} ({rule.errno})"


def _filter(machine: Machine, data: Table, groups: Sequence[Group]) -> Node:
    refuse = Return(ERRNO | data.errnos["EPERM"])
    unknown = Return(ERRNO | data.errnos["ENOSYS"])
    leaves = _leaves(machine, data, groups)
    segments: list[tuple[int, Node]] = [(0, unknown)]
    for low, high in machine.known:
        for number in range(low, high + 1):
            append(segments, number, leaves.get(number, Return(ALLOW)))
        append(segments, high + 1, unknown)
    if machine.x32_bit:
        append(segments, machine.x32_bit, refuse)
    return for_machine(machine, segments, refuse)


def for_machine(machine: Machine, segments: Sequence[tuple[int, Node]], foreign: Node) -> Node:
    """Return the tree that looks at the architecture, then for the segment of a call's number; `foreign` for others."""
    search = Load(OFFSET_NUMBER, FULL_MASK, _search(segments))
    return Load(OFFSET_ARCH, FULL_MASK, Test(JUMP_EQUAL, (machine.audit,), search, foreign))


def encode(tree: Node) -> bytes:
    """Return a tree as the kernel takes it: an array of struct sock_filter, little endian."""
    instructions = _emit(tree)
    if len(instructions) > MAX_INSTRUCTIONS:
        raise ValueError(f"the filter has {len(instructions)} instructions; the kernel takes {MAX_INSTRUCTIONS}")
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions)


def append(segments: list[tuple[int, Node]], start: int, node: Node) -> None:
    """Begin a new segment at `start`, unless it would only repeat the last one."""
    if segments[-1][0] == start:
        segments.pop()
    if not segments or segments[-1][1] != node:
        segments.append((start, node))


def _search(segments: Sequence[tuple[int, Node]]) -> Node:
    if len(segments) == 1:
        return segments[0][1]
    middle = len(segments) // 2
    below, above = _search(segments[:middle]), _search(segments[middle:])
    return Test(JUMP_AT_LEAST, (segments[middle][0],), above, below)


def _leaves(machine: Machine, data: Table, groups: Sequence[Group]) -> dict[int, Node]:
    """Return what happens to each number that any rule names. Built from the last rule backwards: the first wins."""
    leaves: dict[int, Node] = {}
    for rule in reversed([rule for group in groups for rule in group.rules]):
        number = machine.numbers.get(rule.syscall)
        if number is not None:
            refuse = Return(ERRNO | data.errnos[rule.errno])
            leaves[number] = when(rule.when, refuse, leaves.get(number, Return(ALLOW)))
    return leaves


def when(conditions: Sequence[Condition], yes: Node, no: Node) -> Node:
    """Return the tree that goes to `yes` when all conditions hold."""
    if not conditions:
        return yes
    first, inner = conditions[0], when(conditions[1:], yes, no)
    hit, miss = (no, inner) if first.negated else (inner, no)
    return Load(OFFSET_ARGS + 8 * first.arg, first.mask, Test(JUMP_EQUAL, first.values, hit, miss))


def _emit(node: Node) -> list[Instruction]:
    match node:
        case Return(value):
            return [(RETURN, 0, 0, value)]
        case Load(offset, mask, then):
            masking = [] if mask == FULL_MASK else [(AND, 0, 0, mask)]
            return [(LOAD, 0, 0, offset), *masking, *_emit(then)]
        case Test(jump, values, yes, no):
            other = _emit(no)
            return [*_jumps(jump, values, len(other)), *other, *_emit(yes)]


def _jumps(jump: int, values: Sequence[int], distance: int) -> Iterator[Instruction]:
    """Yield the comparisons, each jumping over the rest of them and `distance` further instructions on success.

    Where that is too far for one byte, success jumps to an unconditional jump instead, which has 32 bits.
    """
    count = len(values)
    near = distance + count - 1 <= FAR
    for index, value in enumerate(values):
        left = count - 1 - index
        yield (jump, left + distance if near else left + 1, 0, value)
    if not near:
        yield (JUMP, 0, 0, 1)
        yield (JUMP, 0, 0, distance)
