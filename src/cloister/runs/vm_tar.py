"""What a guest gets to hold beside its image and its disks: the box, copies of what is carried in, as one sealed tar.

Made after the plan was applied, so the box is as any run's: tokens, certificates and files with placeholders are in it.
Names are absolute paths of the guest without the first slash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from cloister.host.carry import Carried
from cloister.isolation.inner import BOX
from cloister.plan.vm import VmLaunch
from cloister.runs.carry_tar import pack

_MOST_ZONE = 64 << 10


class GuestFiles(NamedTuple):
    """The tar, and what was left out of it. Whoever gets it closes `memory`."""

    memory: int
    notices: tuple[str, ...]


def guest_files(vm: VmLaunch, box: str, home: str) -> GuestFiles:
    """Pack the box and what belongs into the home; the box alone for a guest whose processes go on.

    Args:
        vm: what is carried, and which files of the box appear in the home.
        box: the run's box directory on this host.
        home: the agent's home, there and here.

    Raises:
        PolicyError: `carry-too-large`.
        OSError: the box cannot be read.
    """
    below, inside = home.lstrip("/"), BOX.lstrip("/")
    boxed = dict(_boxed(box))
    made = {f"{inside}/{name}": data for name, data in boxed.items()}
    if vm.resumes:
        packed = pack([], (), made=made)
        os.lseek(packed.memory, 0, os.SEEK_SET)
        return GuestFiles(packed.memory, ())
    made |= {f"etc/{name}": data for name, data in _here()}
    made |= {f"{below}/{name}": text.encode() for name, text in vm.seeds}
    made |= {f"{below}/{name}": boxed[source] for name, source in vm.homed if source in boxed}
    carried = [Carried(f"{below}/{one.name}", one.source, one.kind) for one in vm.carried]
    packed = pack(carried, vm.secrets, made=made)
    os.lseek(packed.memory, 0, os.SEEK_SET)  # the keeper reads on from where it is
    return GuestFiles(packed.memory, tuple(notice.replace(f"~/{below}/", "~/", 1) for notice in packed.notices))


def _here() -> Iterator[tuple[str, bytes]]:
    """Yield what a guest shall know of where it is: the time zone."""
    for name in ("localtime", "timezone"):
        try:
            with open(f"/etc/{name}", "rb") as file:
                data = file.read(_MOST_ZONE + 1)
        except OSError:
            continue
        if len(data) <= _MOST_ZONE:
            yield name, data


def _boxed(box: str, below: str = "") -> list[tuple[str, bytes]]:
    """Return the regular files of the box with their contents; sockets are served, not copied."""
    found: list[tuple[str, bytes]] = []
    with os.scandir(f"{box}/{below}" if below else box) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir(follow_symlinks=False):
                found += _boxed(box, name)
            elif entry.is_file(follow_symlinks=False):
                with open(f"{box}/{name}", "rb") as file:
                    found.append((name, file.read()))
    return found
