"""Giving up what this process will not need, before it reads what a hostile guest wrote; there is no way back.

Three walls, and what they stop: a filter of system calls (`isolation/seccomp_narrow`: no socket, no other process, no
new code), Landlock where the kernel has it from its second version on (no path but those given; landlock(7)), limits of
memory, processor time and file size (setrlimit(2)). Open descriptors stay. Modules must all be imported before.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Mapping

from cloister.errors import UnsupportedError
from cloister.host.kernel_features import landlock_abi

# linux/prctl.h, linux/seccomp.h
_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER, _SET_DUMPABLE = 38, 22, 2, 4
# The numbers are the same on every architecture (asm-generic/unistd.h); rights and rules: linux/landlock.h.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _PATH_BENEATH = 444, 445, 446, 1
_WRITE_FILE, _READ_DIR, _REMOVE_FILE = 1 << 1, 1 << 3, 1 << 5
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SYM = 1 << 6, 1 << 7, 1 << 8, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_ABI_1 = (1 << 13) - 1
FILLS = _WRITE_FILE | _READ_DIR | _REMOVE_FILE | _MAKE_CHAR | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER | _TRUNCATE
"""What a directory allows in which files, directories, links and whiteouts are made; what is there is not read."""
_SCOPES = 0b11
"""Abstract sockets and signals."""
_LINKS_SINCE, _TRUNCATE_SINCE, _DEVICES_SINCE, _SCOPES_SINCE = 2, 3, 5, 6
"""Versions of Landlock. The first one lets nobody link a file into another directory."""
MEMORY_BYTES = 4 << 30
PROCESSOR_S = 3600
OPEN_FILES = 64


class _Filter(ctypes.Structure):
    """Linux' struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


class _Rules(ctypes.Structure):
    """Linux' struct landlock_ruleset_attr."""

    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    """Linux' struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def confine_self(narrow: bytes, directories: Mapping[int, int], *, file_bytes: int) -> None:
    """Leave this process its open descriptors, and below `directories` (open) what is named there, such as `FILLS`.

    Args:
        narrow: the filter, an array of struct sock_filter.
        directories: rights by descriptor.
        file_bytes: no file becomes larger than that.

    Raises:
        UnsupportedError: the kernel does not do it, so nothing hostile may be read.
    """
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_CPU: PROCESSOR_S, resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    try:
        for which, wanted in limits.items():
            hard = resource.getrlimit(which)[1]
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(which, (most, most))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        _must(libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0))
        _must(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))
        _landlock(libc, directories)
        _filter(libc, narrow)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UnsupportedError(
            "vm-disk-jail", f"what reads a guest's disk cannot be confined: {why}", remedy="cloister doctor"
        ) from error


def _filter(libc: ctypes.CDLL, narrow: bytes) -> None:
    if not narrow or len(narrow) % 8:
        raise OSError(0, "there is no filter of system calls")
    program = _Filter(len(narrow) // 8, narrow)
    _must(libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0))


def _landlock(libc: ctypes.CDLL, directories: Mapping[int, int]) -> None:
    abi = landlock_abi()
    if abi < _LINKS_SINCE:
        return
    handled = _ABI_1 | _REFER
    handled |= _TRUNCATE if abi >= _TRUNCATE_SINCE else 0
    handled |= _IOCTL_DEV if abi >= _DEVICES_SINCE else 0
    wanted = _Rules(handled, 0, _SCOPES if abi >= _SCOPES_SINCE else 0)
    size = ctypes.sizeof(wanted) if abi >= _SCOPES_SINCE else 8
    rules = _must(libc.syscall(_CREATE_RULESET, ctypes.byref(wanted), ctypes.c_size_t(size), 0))
    try:
        for descriptor, rights in directories.items():
            rule = _Beneath(rights & handled, descriptor)
            _must(libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, ctypes.byref(rule), 0))
        _must(libc.syscall(_RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)


def _must(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
