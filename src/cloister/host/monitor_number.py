"""Numbers for the monitors that root starts: whether this host has any, and what a monitor under one needs to have.

A monitor that its guest has taken over shall not be root, not even one without capabilities: root owns too much. Its
number is nobody's (`plan.vm.number_of`); it enters its jail as root does and takes the number on there (`shim/as.c`).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cloister.errors import StepError, UnsupportedError
from cloister.plan.vm import FIRST_NUMBER, NUMBERS

KVM = "/dev/kvm"
_NEEDED = (0, 1, 6, 7, 21)
"""CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN (linux/capability.h): of the real root."""


def has_numbers(proc: str = "/proc/self") -> bool:
    """Tell whether the process behind a directory of `/proc` can start another under a number of nobody's.

    Root of a container may not: there are the container's numbers only, and it is not the host's root either.
    """
    if os.geteuid() != 0:
        return False
    status = dict(line.partition(":")[::2] for line in Path(proc, "status").read_text(encoding="ascii").splitlines())
    held = int(status.get("CapEff", "0"), 16)
    if not all(held >> bit & 1 for bit in _NEEDED) or Path(proc, "setgroups").read_text(encoding="ascii") != "allow\n":
        return False
    return all(_maps(Path(proc, name)) for name in ("uid_map", "gid_map"))


def groups_for(device: str = KVM) -> tuple[int, ...]:
    """Return the groups that whoever is nobody needs to use a device; none where it is not there, or is everybody's.

    Raises:
        UnsupportedError: `kvm-closed`: nobody but root may use it.
    """
    try:
        status = os.stat(device)
    except FileNotFoundError:
        return ()
    both = stat.S_IROTH | stat.S_IWOTH
    if status.st_mode & both == both:
        return ()
    both = stat.S_IRGRP | stat.S_IWGRP
    if status.st_mode & both == both and status.st_gid != 0:
        return (status.st_gid,)
    raise UnsupportedError(
        "kvm-closed", "a monitor does not run as root, and nobody else may use the device", where=device,
        remedy=f"chgrp kvm {device} && chmod 660 {device}",
    )  # fmt: skip


def check_reachable(*programs: str) -> None:
    """See that somebody who is nobody may run these programs.

    Raises:
        UnsupportedError: `program-private`.
    """
    for program in programs:
        if not os.stat(program).st_mode & stat.S_IXOTH:
            raise UnsupportedError(
                "program-private", "a monitor does not run as root, and nobody else may run this program",
                where=program, remedy=f"chmod o+rx {program}",
            )  # fmt: skip


def hand_over(descriptor: int, number: int, *, write: bool) -> None:
    """Let a number open again what it gets by descriptor (`/proc/self/fd/N` asks the file, not the descriptor).

    Nobody else gets there: what is ours lies below directories of ours.

    Args:
        descriptor: of the file.
        number: who shall open it.
        write: also for writing: then its group is that number. Else it may be everybody's.

    Raises:
        StepError: it belongs to somebody else, and is not everybody's to read or is to be written.
    """
    status = os.fstat(descriptor)
    if not write and status.st_mode & stat.S_IROTH:
        return
    if status.st_uid != os.geteuid():
        where = os.readlink(f"/proc/self/fd/{descriptor}")
        raise StepError("file-unshared", "the monitor could not use a file of somebody else's", where=where)
    if write:
        os.fchown(descriptor, -1, number)
        os.fchmod(descriptor, 0o660)
    else:
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode) | 0o444)


def _maps(path: Path) -> bool:
    """Tell whether a map of a user namespace has all of the numbers (user_namespaces(7))."""
    for line in path.read_text(encoding="ascii").splitlines():
        first, _, count = (int(word) for word in line.split())
        if first <= FIRST_NUMBER and first + count >= FIRST_NUMBER + NUMBERS:
            return True
    return False
