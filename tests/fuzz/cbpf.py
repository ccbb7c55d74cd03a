"""A classic BPF machine in Python, as far as seccomp filters use it: the judge of what our bytes mean.

Written from linux/filter.h and Documentation/networking/filter.rst, not from the assembler, and strict:
an unknown instruction, a jump out of the program or a load beyond struct seccomp_data is an error, as
it is in the kernel's own check (net/core/filter.c, kernel/seccomp.c).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

SIZE_OF_SECCOMP_DATA = 64


@lru_cache
def _decoded(program: bytes) -> list[tuple[int, ...]]:
    return list(struct.iter_unpack("<HBBI", program))


def run(program: bytes, number: int, audit_arch: int, args: Sequence[int]) -> tuple[int, int]:
    """Return the filter's value for one system call, and how many instructions it took."""
    data = struct.pack("<IIQ6Q", number, audit_arch, 0, *args)
    instructions = _decoded(program)
    accumulator = counter = steps = 0
    while True:
        code, jt, jf, k = instructions[counter]
        counter += 1
        steps += 1
        match code:
            case 0x20:
                assert k % 4 == 0
                assert k + 4 <= SIZE_OF_SECCOMP_DATA
                (accumulator,) = struct.unpack_from("<I", data, k)
            case 0x54:
                accumulator &= k
            case 0x05:
                counter += k
            case 0x15:
                counter += jt if accumulator == k else jf
            case 0x35:
                counter += jt if accumulator >= k else jf
            case 0x06:
                return k, steps
            case _:
                raise AssertionError(f"instruction {code:#x} is not one a filter of ours uses")
