"""What a monitor that its guest has taken over can write where root started it, in either jail.

Under a number of its own it is nobody. Where a host has none, as in a container, it is root without capabilities.
"""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.host.memory_file import memory_file
from cloister.isolation import seccomp
from cloister.isolation.inner import BOX
from cloister.isolation.monitor_jail import VM, Jail, Number, jail_argv
from cloister.isolation.namespace import SECCOMP_FD
from cloister.isolation.template_jail import template_argv
from cloister.plan.vm import FIRST_NUMBER
from cloister.runs.client import SHIM

pytestmark = [pytest.mark.kernel, pytest.mark.root]
TRIES = """value=$(cat /proc/sys/kernel/core_pattern)
(echo "$value" > /proc/sys/kernel/core_pattern) 2>/dev/null && echo writes core_pattern
(: >> /proc/sysrq-trigger) 2>/dev/null && echo opens sysrq-trigger
(umount /proc/sys || mount -t proc none /tmp || unshare -m true || unshare -U true) 2>/dev/null && echo mounts
touch /usr/x /run/x /x 2>/dev/null && echo writes outside
find /proc -writable -not -path '/proc/[0-9]*' -not -path '/proc/*self/*' 2>/dev/null |
    grep -v '^/proc/mtrr$\\|^/proc/pressure/'
grep CapEff /proc/self/status
id -u; id -G
echo mine > /tmp/x && cat /tmp/x
"""
"""Writes what is there already, if anything. mtrr and pressure ask for a capability when they are written."""


def said(argv: tuple[str, ...]) -> str:
    """Run a jail with its filter, and return what is printed in it."""
    filtered = memory_file("filter", seccomp.assemble(platform.machine(), nested=False, ptrace=False, netlink=False))
    words = [str(filtered) if before == "--seccomp" else word for before, word in zip(("", *argv), argv, strict=False)]
    assert str(SECCOMP_FD) in argv
    try:
        done = subprocess.run(words, pass_fds=[filtered], capture_output=True, text=True, timeout=60, check=False)
    finally:
        os.close(filtered)
    assert done.returncode == 0, done.stderr
    return done.stdout


NUMBER = Number(FIRST_NUMBER + 5, (44444,))
NUMBERS = [pytest.param(NUMBER, id="number"), pytest.param(None, id="root")]


def nothing(number: Number | None) -> str:
    """Return what is said where no attempt succeeds."""
    who = f"{NUMBER.uid}\n{NUMBER.uid} 44444" if number else "0\n0"
    return f"CapEff:\t0000000000000000\n{who}\nmine\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_templates_monitor_writes_nothing_of_the_hosts(number: Number | None) -> None:
    """Neither the program that the kernel starts for a core, nor anything else that is root's."""
    argv = template_argv(
        "/usr/bin/bwrap", ("/bin/sh", "-c", TRIES), merged_usr=True, extra_system=(), kvm=False, uid=os.geteuid(),
        number=number, shim=SHIM,
    )  # fmt: skip
    assert said(argv) == nothing(number)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that can be reached without any right: the tests' own lies below another user's."""
    with tempfile.TemporaryDirectory(prefix="cloister-jail-", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_runs_monitor_writes_nothing_of_the_hosts(place: Path, number: Number | None) -> None:
    """The same in the jail of a run, but for its own directory. The keeper's place is taken by the attack."""
    for name in ("box", "vm"):
        (place / name).mkdir()
    (place / "vm").chmod(0o777 if number else 0o700)
    (place / "box/theirs").write_text("x")
    (place / "box/theirs").chmod(0o600)
    tries = f"{TRIES}echo kept > {VM}/kept; cat {BOX}/theirs 2>/dev/null; true"
    jail = Jail(
        bubblewrap="/usr/bin/bwrap", shim=SHIM, box_directory=str(place / "box"),
        vm_directory=str(place / "vm"), merged_usr=True, uid=os.geteuid(), gid=os.getegid(), kvm=False,
        sockets=(), monitor=("/bin/true",), number=number,
    )  # fmt: skip
    argv = jail_argv(jail)
    before = argv.index("keeper") - 1
    assert said((*argv[:before], "/bin/sh", "-c", tries)) == nothing(number) + ("" if number else "x")
    assert (place / "vm/kept").read_text() == "kept\n"
    assert (place / "vm/kept").stat().st_uid == (number.uid if number else 0)
    assert [path.name for path in (place / "box").iterdir()] == ["theirs"]
