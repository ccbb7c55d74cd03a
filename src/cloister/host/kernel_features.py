"""Ask the kernel what it can enforce: the Landlock ABI and seccomp's actions. Enforces nothing."""

from __future__ import annotations

import ctypes
from typing import Any

# The number is the same on every architecture (asm-generic/unistd.h); seccomp's is not.
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_CREATE_RULESET_VERSION = 1
SECCOMP_NUMBERS = {"x86_64": 317, "aarch64": 277, "riscv64": 277}
SECCOMP_GET_ACTION_AVAIL = 2
SECCOMP_RET_ERRNO = 0x00050000


def landlock_abi() -> int:
    """Return the ABI version of Landlock, 0 where it is not built in or not switched on (landlock(7))."""
    size, flags = ctypes.c_size_t(0), ctypes.c_uint32(LANDLOCK_CREATE_RULESET_VERSION)
    return max(0, _syscall(LANDLOCK_CREATE_RULESET, None, size, flags))


def seccomp_errno(arch: str) -> bool:
    """Return whether filters may answer with error numbers (seccomp(2), SECCOMP_GET_ACTION_AVAIL)."""
    number = SECCOMP_NUMBERS.get(arch)
    if number is None:
        return False
    action = ctypes.c_uint32(SECCOMP_RET_ERRNO)
    operation, flags = ctypes.c_uint(SECCOMP_GET_ACTION_AVAIL), ctypes.c_uint(0)
    return _syscall(number, operation, flags, ctypes.byref(action)) == 0


def _syscall(number: int, *arguments: Any) -> int:
    libc = ctypes.CDLL(None)
    libc.syscall.restype = ctypes.c_long
    return int(libc.syscall(ctypes.c_long(number), *arguments))
