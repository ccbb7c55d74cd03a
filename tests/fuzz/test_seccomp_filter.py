"""The filter bytes do what the table says, for every number, architecture and argument."""

from __future__ import annotations

import itertools
import struct

import cbpf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.isolation import seccomp
from cloister.isolation.seccomp_table import table

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
EPERM, ENOSYS = 1, 38
TABLE = table()
ARCHES = sorted(TABLE.machines)
CONSTANTS = sorted({v for g in TABLE.groups for r in g.rules for c in r.when for v in (c.mask, *c.values)} | {3, 40})
NUMBERS = sorted(
    {
        number + step
        for machine in TABLE.machines.values()
        for number in [*machine.numbers.values(), *(end for known in machine.known for end in known), 1 << 30]
        for step in (-1, 0, 1)
        if number + step >= 0
    }
)

LOOKED_AT = sorted({rule.syscall for group in TABLE.groups for rule in group.rules if rule.when})

numbers = st.sampled_from(NUMBERS) | st.integers(0, 600) | st.integers(0, 2**32 - 1)
words = st.sampled_from(CONSTANTS) | st.integers(0, 2**32 - 1)
arguments = st.builds(lambda low, high: high << 32 | low, words, st.just(0) | st.integers(0, 2**32 - 1))
lifts = st.fixed_dictionaries({lift: st.booleans() for lift in ("nested", "ptrace", "netlink", "listeners")})


def meaning(arch, number, args, lifted):
    """Say what the table means, read line by line and without a tree."""
    machine = TABLE.machines[arch]
    if machine.x32_bit and number >= machine.x32_bit:
        return ERRNO | EPERM
    if not any(low <= number <= high for low, high in machine.known):
        return ERRNO | ENOSYS
    for group in TABLE.groups:
        for rule in group.rules:
            if group.lift and lifted[group.lift]:
                continue
            if machine.numbers.get(rule.syscall) == number and all(
                ((args[c.arg] & 0xFFFFFFFF & c.mask) in c.values) != c.negated for c in rule.when
            ):
                return ERRNO | TABLE.errnos[rule.errno]
    return ALLOW


@given(st.sampled_from(ARCHES), numbers, st.tuples(*[arguments] * 6), lifts)
def test_filter_equals_table(arch, number, args, lifted):
    """For any call, the bytes answer what the table says, and answer it within thirty instructions."""
    value, steps = cbpf.run(seccomp.assemble(arch, **lifted), number, TABLE.machines[arch].audit, args)
    assert value == meaning(arch, number, args, lifted)
    assert steps <= 30


@given(st.sampled_from(ARCHES), numbers, st.integers(0, 2**32 - 1), st.tuples(*[arguments] * 6), lifts)
def test_foreign_architecture_is_refused(arch, number, audit, args, lifted):
    """A call through any other ABI (int 0x80, ARM on aarch64) is refused, whatever its number means there."""
    if audit != TABLE.machines[arch].audit:
        assert cbpf.run(seccomp.assemble(arch, **lifted), number, audit, args)[0] == ERRNO | EPERM


@pytest.mark.parametrize("arch", ARCHES)
def test_every_number_without_arguments(arch):
    """All 1,024 lowest numbers, exhaustively, in the strictest and the loosest profile."""
    for on in (False, True):
        lifted = {"nested": on, "ptrace": on, "netlink": on, "listeners": on}
        program = seccomp.assemble(arch, **lifted)
        for number in range(1024):
            value, _ = cbpf.run(program, number, TABLE.machines[arch].audit, [0] * 6)
            assert value == meaning(arch, number, [0] * 6, lifted), number


@pytest.mark.parametrize("syscall", LOOKED_AT)
@pytest.mark.parametrize("on", [False, True])
def test_every_edge_of_every_argument_rule(syscall, on):
    """For calls decided by argument, all combinations of the values near each condition, high bits set or not."""
    lifted = {"nested": on, "ptrace": on, "netlink": not on, "listeners": on}
    program, machine = seccomp.assemble("x86_64", **lifted), TABLE.machines["x86_64"]
    conditions = [c for g in TABLE.groups for r in g.rules if r.syscall == syscall for c in r.when]
    edges = {}
    for c in conditions:
        bits = [1 << bit for bit in range(32) if c.mask >> bit & 1 and c.mask != 0xFFFFFFFF]
        near = {value + step for value in c.values for step in (0, 1)} | {0, 17, *bits, bits[0] if bits else 5}
        edges.setdefault(c.arg, set()).update(near | {value | 0x80000 for value in near})
    for values in itertools.product(*[sorted(edges[arg]) for arg in sorted(edges)]):
        for high in (0, 1 << 32):
            args = [0] * 6
            for arg, value in zip(sorted(edges), values, strict=True):
                args[arg] = value & 0xFFFFFFFF | high
            number = machine.numbers[syscall]
            value, _ = cbpf.run(program, number, machine.audit, args)
            assert value == meaning("x86_64", number, args, lifted), args


@pytest.mark.parametrize("number", [1 << 30, 1 << 30 | 39, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_the_x32_bit_is_refused(number):
    """Numbers of the x32 ABI are a foreign ABI, on x86_64; elsewhere they are only unknown."""
    for arch, error in (("x86_64", EPERM), ("aarch64", ENOSYS), ("riscv64", ENOSYS)):
        got, _ = cbpf.run(seccomp.assemble(arch), number, TABLE.machines[arch].audit, [0] * 6)
        assert got == ERRNO | error


@given(st.integers(0, 700), st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), st.integers(0, 9))
def test_far_jumps_land(padding, values, probe):
    """A comparison reaches its target at any distance, also beyond the 255 instructions of a short jump."""
    node = seccomp.Return(0)
    for _ in range(padding):
        node = seccomp.Load(0, 0xFFFFFFFF, node)
    tree = seccomp.Load(0, 0xFFFFFFFF, seccomp.Test(seccomp.JUMP_EQUAL, tuple(values), seccomp.Return(1), node))
    program = b"".join(struct.pack("<HBBI", *each) for each in seccomp._emit(tree))
    assert cbpf.run(program, probe, 0, [0] * 6)[0] == (1 if probe in values else 0)
