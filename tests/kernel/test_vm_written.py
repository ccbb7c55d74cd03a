"""A living machine out of a monitor that takes no pipe, and may be its guest's: two files, of which lengths count."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from cloister.errors import CloisterError, RetryError, StepError
from cloister.host import vm_snapshot
from cloister.host.vm_written import Written
from cloister.plan.vm import VmFile, VmLaunch
from cloister.plan.vm_snapshot import Disk, Snapshot
from cloister.runs.vm_firecracker import keep_firecracker
from cloister.runs.vm_standing import paused
from support import fake_firecracker
from support.listening import await_socket

pytestmark = pytest.mark.kernel
MIB = 64
HANDED = (
    "import os, sys; os.dup2(int(sys.argv[1]), 10); os.dup2(int(sys.argv[2]), 11); os.execv(sys.argv[3], sys.argv[3:])"
)
ROLES = ("kernel", "initramfs", "root", "var", "workspace", "memory-out", "state-out")


class Kept:
    """A machine of a fake Firecracker, and where its snapshots go."""

    def __init__(self, directory: Path, mode: str) -> None:
        self.place, self.root = directory / "vm", directory / "snapshots"
        self.place.mkdir()
        self.written, self.went_on = Written(), 0
        handed = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in self.written.make(str(self.place), MIB)]
        argv = [sys.executable, "-c", HANDED, *map(str, handed), sys.executable, fake_firecracker.__file__]
        self.process = subprocess.Popen([*argv, mode, str(self.place)], pass_fds=handed)
        for descriptor in handed:
            os.close(descriptor)
        self.vm = VmLaunch(
            image="test", version=1, manifest="", monitor="firecracker", accelerator="kvm", memory_mib=MIB, cpus=1,
            files=tuple(VmFile(role=role, path="") for role in ROLES),  # type: ignore[arg-type]
            fields=(), inner=(), directory=str(self.place), disk_bytes=1,
        )  # fmt: skip
        await_socket(self.place / "api.sock")

    def keep(self) -> Snapshot:
        """Take a snapshot of it."""

        def go_on() -> None:
            self.went_on += 1

        with contextlib.closing(self.written.lend()) as sheets:
            held, taken = partial(paused, self.vm, go_on), partial(keep_firecracker, sheets)
            return vm_snapshot.take(str(self.root), "one", {}, describe, held, taken)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.written.close()


def describe(disks: tuple[Disk, ...], paused_s: float) -> Snapshot:
    """Return a record."""
    return Snapshot(
        name="one", run="r", agent="a", profile="", workspace="/p", asked=(), image="test", version=1,
        manifest="0" * 64, made=1.0, paused_s=paused_s, fields=(), disks=disks,
    )  # fmt: skip


@pytest.fixture
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    """A machine whose monitor behaves as its mode says."""
    made = Kept(tmp_path, getattr(request, "param", "good"))
    yield made
    made.close()


def test_what_it_writes_is_kept(kept: Kept) -> None:
    """Both files, hashed, the memory sparse; what the monitor has of them is empty again, as for a second one."""
    before = len(os.listdir("/proc/self/fd"))
    record = kept.keep()
    assert [disk.name for disk in record.disks] == ["memory", "state"]
    snapshot = kept.root / "one"
    assert (snapshot / "memory").stat().st_size == fake_firecracker.BYTES
    assert (snapshot / "memory").stat().st_blocks * 512 < 1 << 20
    for name, at, text in (("memory", 1 << 20, b"guest memory"), ("state", 0, fake_firecracker.WRITTEN)):
        sealed = vm_snapshot.state(str(kept.root), record, name)
        assert os.pread(sealed, len(text), at) == text
        with pytest.raises(PermissionError):
            os.pwrite(sealed, b"x", 0)
        os.close(sealed)
    assert [os.stat(f"/proc/{kept.process.pid}/fd/{number}").st_size for number in (10, 11)] == [0, 0]
    asked = (kept.place / "asked").read_bytes().split()
    assert [msgspec.json.decode(one)["state"] for one in asked] == ["Paused", "Resumed"]
    vm_snapshot.remove(str(kept.root), "one")
    kept.keep()
    assert kept.went_on == 2
    assert len(os.listdir("/proc/self/fd")) == before


BAD = {
    "grown": "a memory of 1099511627776 bytes",
    "short": "a memory of 67108863 bytes",
    "endless": "a state of 1099511627776 bytes",
    "empty": "a state of 0 bytes",
    "nothing": "a memory of 0 bytes",
    "refuses": "without a reason",
    "deaf": "cannot be talked to",
}


@pytest.mark.parametrize(("kept", "words"), BAD.items(), indirect=["kept"], ids=list(BAD))
def test_what_no_machine_has_is_no_snapshot(kept: Kept, words: str) -> None:
    """More, less or nothing, a refusal, a version that restores nobody: the machine goes on, and nothing is left."""
    with pytest.raises(CloisterError, match=words):
        kept.keep()
    assert kept.went_on == 1
    assert list(kept.root.iterdir()) == []
    assert b"Resumed" in (kept.place / "asked").read_bytes()
    assert [os.stat(f"/proc/{kept.process.pid}/fd/{number}").st_size for number in (10, 11)] == [0, 0]


@pytest.mark.parametrize("kept", ["links"], indirect=True)
def test_links_in_its_directory_lead_nowhere(kept: Kept, tmp_path: Path) -> None:
    """Whatever it puts under whatever name: what is read is what it was handed."""
    (tmp_path / "another").write_text("secret")
    kept.keep()
    assert (kept.place / "memory").is_symlink()
    assert (tmp_path / "another").read_text() == "secret"
    assert (kept.root / "one/state").read_bytes() == fake_firecracker.WRITTEN
    assert not (kept.root / "one/memory").is_symlink()


def test_a_place_that_is_none_is_said(tmp_path: Path) -> None:
    """No directory, or something of that name: the run does not start."""
    written = Written()
    for place in (tmp_path / "none", tmp_path):
        (tmp_path / "memory.out").touch()
        with pytest.raises(StepError, match="no place to keep the machine"):
            written.make(str(place), MIB)
    written.close()


def test_a_machine_that_has_ended_lends_nothing(tmp_path: Path) -> None:
    """A snapshot that is under way keeps its own descriptors; a later one is told."""
    written = Written()
    handed = written.make(str(tmp_path), MIB)
    assert list(tmp_path.iterdir()) == []
    with contextlib.closing(written.lend()) as sheets:
        written.close()
        os.pwrite(handed[1], b"state", 0)
        os.mkdir(tmp_path / "to")
        assert sheets.take(str(tmp_path / "to")) == ("memory", "state")
    with pytest.raises(RetryError, match="ending"):
        written.lend()
    for descriptor in handed:
        os.close(descriptor)
