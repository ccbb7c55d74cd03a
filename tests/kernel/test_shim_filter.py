"""Our own system call filter, installed by the shim of a unit from a file: whole, before anything else runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from shim_rig import Rig, rig_of_test
from unit_rig import Unit

from cloister.isolation import seccomp

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)
# TIOCSTI with the high half set (CVE-2019-10063), as errno; then what must still work.
INJECT = """
import ctypes, os, pty
libc = ctypes.CDLL(None, use_errno=True)
pty.openpty()
def ask(request):
    ctypes.set_errno(0)
    libc.syscall(IOCTL, 0, ctypes.c_ulong(request), b"x")
    return ctypes.get_errno()
print(ask(0x5412), ask(0x5412 | 1 << 40), ask(0x5401), os.getpid() > 0)
""".replace("IOCTL", {"x86_64": "16"}.get(os.uname().machine, "29"))


@pytest.fixture
def filtered(rig: Rig) -> Path:
    """A file with the filter, as the box has it."""
    path = rig.work / "seccomp.bpf"
    path.write_bytes(seccomp.assemble(os.uname().machine))
    path.chmod(0o644)
    return path


def _injected(unit: Unit) -> list[bytes]:
    try:
        return unit.run("python3", "-c", INJECT)[1].split()
    finally:
        unit.close()


def test_arguments_are_looked_at(rig: Rig, filtered: Path) -> None:
    """Typing into a terminal is refused in every spelling; without the file the kernel itself answers, otherwise."""
    with_filter, without = _injected(Unit(rig, "--seccomp", str(filtered))), _injected(Unit(rig))

    assert with_filter[:2] == [b"1", b"1"]
    assert with_filter[2] != b"1", "another request is none of its business"
    assert with_filter[3] == b"True"
    assert without[0] != b"1"


@pytest.mark.parametrize("what", ["missing", "empty", "cut", "too long", "nonsense", "link"])
def test_without_its_filter_nothing_runs(rig: Rig, filtered: Path, what: str) -> None:
    """A filter that is not there, or not whole, or that the kernel does not take, fails the self-probe."""
    text = filtered.read_bytes()
    filtered.unlink()
    if what == "link":
        (rig.work / "elsewhere").write_bytes(text)
        filtered.symlink_to(rig.work / "elsewhere")
    elif what != "missing":
        filtered.write_bytes({"empty": b"", "cut": text[:-3], "too long": text * 100, "nonsense": b"\xff" * 64}[what])
    unit = Unit(rig, "--seccomp", str(filtered))
    try:
        assert unit.begin()[-1] == "verdict=failed"
        assert unit.process.wait(10) == 125
    finally:
        unit.close()
