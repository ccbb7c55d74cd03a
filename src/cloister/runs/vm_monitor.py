"""Which monitor runs a guest here: QEMU everywhere, Firecracker where it is installed and really boots one.

`auto` asks for Firecracker only where KVM was seen to boot a guest; who names it in a policy gets it or a refusal,
never silently the other one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cloister.errors import UnsupportedError
from cloister.host.firecracker_probe import Verdict, probe
from cloister.host.programs import trusted
from cloister.isolation.firecracker_api import parse_version
from cloister.plan.vm import Monitor
from cloister.runs.vm_accelerator import Trying, quietly

NAME = "firecracker"
_PLACES = ("/usr/local/bin", "/usr/bin", "/opt/firecracker", "/run/current-system/sw/bin")
_OTHER = 'set `monitor = "qemu"` in [agents.NAME.microvm]'

Try = Callable[[str], Verdict]
"""Asks whether the Firecracker at a path boots a guest here."""


class Choice(NamedTuple):
    """The monitor, and its program; empty for QEMU, which has places of its own."""

    monitor: Monitor
    program: str


class Wanted(NamedTuple):
    """What the policy asks for."""

    monitor: str
    """`auto`, `firecracker` or `qemu`."""
    network: str
    """`none` or `bridge`."""


def choose(wanted: Wanted, *, kvm: Callable[[], bool], program: str, attempt: Try) -> Choice:
    """Return the monitor of a run.

    Args:
        wanted: what the policy asks for.
        kvm: tells whether KVM was seen to boot a guest on this host; asked only where the answer matters.
        program: path of Firecracker, empty where it is not installed.
        attempt: boots a guest with it; asked last, and only where the answer matters.

    Raises:
        UnsupportedError: Firecracker is asked for by name, and cannot run this guest here.
    """
    if wanted.monitor == "qemu" or (wanted.monitor == "auto" and not (program and kvm())):
        return Choice("qemu", "")
    why = next(_against(wanted, program, attempt), None)
    if why is None:
        return Choice("firecracker", program)
    if wanted.monitor == "auto":
        return Choice("qemu", "")
    raise why


def find(search: str, *, owner: int, forbidden: tuple[str, ...] = ()) -> str:
    """Return where Firecracker is, by its real path; else nothing.

    It is started as the user outside of any sandbox (to ask for its version, and to try it), so it counts only where
    nobody but root and the user could have put it.

    Args:
        search: a PATH, looked through behind the usual places.
        owner: the user's uid.
        forbidden: directories that an agent can write.
    """
    return next((path for path, counts in _installed(search, owner, forbidden) if counts), "")


def passed_over(search: str, *, owner: int) -> str:
    """Return the first Firecracker that does not count, since others could have put it there; else nothing."""
    return next((path for path, counts in _installed(search, owner, ()) if not counts), "")


def _installed(search: str, owner: int, forbidden: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Yield each that is there, by its real path, and whether it counts."""
    for directory in (*_PLACES, *search.split(":")):
        program = Path(directory, NAME)
        if not directory.startswith("/") or not program.is_file() or not os.access(program, os.X_OK):
            continue
        real, place = program.resolve(), Path(directory).resolve()
        ways = {real, *real.parents, place, *place.parents}
        yield str(real), not any(str(way) in forbidden for way in ways) and all(trusted(way, owner) for way in ways)


def attempt(program: str, image: str, runtime: str, trying: Trying = quietly) -> Verdict:
    """Return whether it boots the kernel of an image here; tried once after each start of the host."""
    return probe(program, f"{image}/vmlinux", f"{image}/initramfs.cpio", f"{runtime}/firecracker.json", trying)


def _against(wanted: Wanted, program: str, attempt: Try) -> Iterator[UnsupportedError]:
    """Yield what speaks against Firecracker, the cheap questions first."""
    if wanted.network != "none":
        yield _refusal(
            "firecracker-bridge", "firecracker opens a network device by name, where a user's run has none to open"
        )
    if not program:
        yield _refusal("firecracker-unavailable", "there is no firecracker on this host")
        return
    verdict = attempt(program)
    try:
        parse_version(verdict.version)
    except UnsupportedError as error:
        yield error
        return
    if not verdict.seconds:
        yield _refusal("firecracker-unavailable", f"firecracker boots no guest here: {verdict.why}")


def _refusal(reference: str, message: str) -> UnsupportedError:
    return UnsupportedError(reference, message, where=".microvm.monitor", remedy=_OTHER)
