"""The table of system calls (`calls.toml`): which are events, how the kernel's side reads them, and their names.

`shapes` is what the BPF programs get (one number per call), `described` what the reader gets. Both come from the same
rows, so kernel and log agree on where a text stands.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

from cloister.audit.kinds import kinds

CALLS = 512
COMPAT = 511
"""The number under which calls by another table (int 0x80, x32) are counted."""
UNKNOWN = 510
"""The number under which calls beyond the table are counted."""
Wanted = Literal["off", "security", "all"]
_OPENS, _ADDRESS, _CRITICAL, _ON, _FAILED = 0x200, 0x400, 0x800, 0x1000, 0x2000
_NO_FLAGS = 255
_COLUMNS = {"x86_64": 0, "aarch64": 1}


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of one system call; the fields are those of `calls.toml`."""

    kind: str = "kernel.invoked"
    texts: tuple[int, ...] = ()
    directory: int = -1
    opens: bool = False
    address: bool = False
    flags: int = _NO_FLAGS
    files: bool = False
    bulk: bool = False

    @property
    def shape(self) -> int:
        """The number that tells the kernel's side what to read (`audit/bpf/event.h`)."""
        first, second = (*(index + 1 for index in self.texts), 0, 0)[:2]
        shape = _ON | first | second << 3 | (self.directory + 1) << 6
        return shape | _OPENS * self.opens | _ADDRESS * self.address | (0 if self.bulk else _CRITICAL)


class Described(NamedTuple):
    """How the reader writes a call: in the order of `host.kernel_events.Call`."""

    number: int
    name: str
    kind: str
    severity: int
    shape: int
    flags_at: int


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    security: dict[str, Call]
    numbers: dict[str, tuple[int, int]]


@functools.cache
def table() -> Table:
    """Return the table that ships with this package."""
    text = importlib.resources.files("cloister.audit").joinpath("calls.toml").read_bytes()
    return msgspec.toml.decode(text, type=Table)


def numbers(machine: str) -> Mapping[str, int]:
    """Return the numbers of all system calls of `x86_64` or `aarch64`; nothing for other machines."""
    column = _COLUMNS.get(machine)
    if column is None:
        return {}
    return {name: pair[column] for name, pair in table().numbers.items() if pair[column] >= 0}


def shapes(machine: str, wanted: Wanted, *, files_elsewhere: bool) -> tuple[int, ...]:
    """Return a shape for each number.

    With `files_elsewhere`, of what LSM programs tell better only failures are events.
    """
    found = [0] * CALLS
    if wanted == "off":
        return tuple(found)
    for name, number in numbers(machine).items():
        call = table().security.get(name)
        if call:
            found[number] = call.shape | (_FAILED if call.files and files_elsewhere else 0)
        elif wanted == "all":
            found[number] = _ON
    found[COMPAT] = _ON | _CRITICAL
    if wanted == "all":
        found[UNKNOWN] = _ON
    return tuple(found)


def described(machine: str) -> list[Described]:
    """Return how each call is written, of all calls that there are."""
    found = []
    for name, number in numbers(machine).items():
        call = table().security.get(name, Call(bulk=True))
        severity = kinds()[call.kind].severity if name in table().security else 1
        found.append(Described(number, name, call.kind, severity, call.shape, call.flags))
    found.append(Described(COMPAT, "compat", "kernel.invoked", 3, _ON | _CRITICAL, _NO_FLAGS))
    found.append(Described(UNKNOWN, "unknown", "kernel.invoked", 1, _ON, _NO_FLAGS))
    return found
