"""The disk that an agent keeps: made once, grown, repaired, and written by one virtual machine at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import vm_disk_rig as rig

from cloister.errors import UnsupportedError
from cloister.host import e2fs, vm_disks
from cloister.host.e2fs import DiskToolError, Tools
from cloister.host.vm_disks import HeldDisk, hold_var_disk, superblock

pytestmark = pytest.mark.kernel

SIZE = 64 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where the disk is kept."""
    return tmp_path / "agents/pi/var.img"


def hold(disk: Path, size: int = SIZE) -> HeldDisk:
    """Take the disk as a run does."""
    return hold_var_disk(rig.tools(), str(disk), size, spare=str(disk.parent.parent / "spare.img"))


def test_a_disk_is_made_once_and_keeps_what_is_on_it(disk: Path, tmp_path: Path) -> None:
    """The first run finds it empty, the next one as the first left it; it takes no more room than what is on it."""
    first = hold(disk)
    assert (first.path, first.notice) == (str(disk), "")
    assert disk.stat().st_mode & 0o777 == 0o600
    assert disk.stat().st_blocks * 512 < SIZE / 4
    first.close()
    rig.check(disk)
    rig.write(disk, "/history", b"kept", scratch=tmp_path)
    second = hold(disk)
    second.close()
    assert rig.seen(disk)[b"history"] == b"kept"


def test_the_descriptor_is_the_disk_and_its_lock(disk: Path) -> None:
    """A monitor gets what is locked: a second run gets a copy while any process has it, and the disk when none has."""
    first = hold(disk)
    child = subprocess.Popen(["/bin/sleep", "60"], pass_fds=(first.fd,))
    first.close()
    second = hold(disk)
    assert second.path.endswith("spare.img")
    assert "copy" in second.notice
    rig.check(Path(second.path))
    child.kill()
    child.wait()
    third = hold(disk)
    assert third.path == str(disk)
    assert os.path.samestat(os.fstat(third.fd), disk.stat())
    for held in (second, third):
        held.close()
    assert not Path(second.path).exists()


def test_a_copy_has_what_the_disk_has(disk: Path, tmp_path: Path) -> None:
    """The second run of an agent sees its history, and what it writes goes away with it."""
    hold(disk).close()
    rig.write(disk, "/history", b"kept", scratch=tmp_path)
    first = hold(disk)
    second = hold(disk)
    assert rig.seen(Path(second.path))[b"history"] == b"kept"
    first.close()
    second.close()


def test_a_larger_policy_makes_it_larger_and_never_smaller(disk: Path, tmp_path: Path) -> None:
    """It grows with what is on it; a smaller number later changes nothing."""
    hold(disk).close()
    rig.write(disk, "/history", b"kept", scratch=tmp_path)
    for size, blocks in ((2 * SIZE, 2 * SIZE // 4096), (SIZE, 2 * SIZE // 4096)):
        held = hold(disk, size)
        assert superblock(held.fd).blocks == blocks
        assert held.notice == ""
        held.close()
        rig.check(disk)
    assert rig.seen(disk)[b"history"] == b"kept"


def test_growing_that_was_cut_short_is_finished(disk: Path) -> None:
    """A file that is longer than its file system, since a process died between the two, is grown at the next start."""
    hold(disk).close()
    os.truncate(disk, 2 * SIZE)
    held = hold(disk)
    assert superblock(held.fd).blocks == 2 * SIZE // 4096
    held.close()


def test_an_unclean_disk_is_repaired_before_its_next_use(disk: Path, tmp_path: Path) -> None:
    """What a guest that died left open is closed by e2fsck in the jail; its files are still there."""
    hold(disk).close()
    rig.write(disk, "/history", b"kept", scratch=tmp_path)
    rig.debugfs(disk, "dirty", "feature needs_recovery")
    held = hold(disk)
    assert not superblock(held.fd).unclean
    assert held.notice == ""
    held.close()
    rig.check(disk)
    assert rig.seen(disk)[b"history"] == b"kept"


@pytest.mark.parametrize("damage", [b"\0" * 1024, b"\xff" * 1024])
def test_a_disk_beyond_repair_is_set_aside(disk: Path, damage: bytes) -> None:
    """The agent starts with an empty disk and is told where the old one is."""
    hold(disk).close()
    with disk.open("r+b") as file:
        file.seek(1024)
        file.write(damage)
    held = hold(disk)
    assert held.path == str(disk)
    assert f"{disk}.broken" in held.notice
    assert Path(f"{disk}.broken").exists()
    held.close()
    rig.check(disk)


def test_a_maker_that_was_killed_leaves_nothing_in_the_way(disk: Path) -> None:
    """An empty file, or half a disk under another name, is no disk: one is made."""
    disk.parent.mkdir(parents=True)
    disk.touch()
    Path(f"{disk}.partial").write_bytes(b"half")
    held = hold(disk)
    assert superblock(held.fd).blocks == SIZE // 4096
    held.close()
    assert not Path(f"{disk}.partial").exists()


def test_a_link_in_its_place_is_not_followed(disk: Path, tmp_path: Path) -> None:
    """Nobody's file is formatted through a link."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    disk.parent.mkdir(parents=True)
    disk.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        hold(disk)
    assert victim.read_text() == "mine"


def test_a_tool_that_fails_says_why(tmp_path: Path) -> None:
    """The error has the tool's last words and the disk; a missing tool says what to install."""
    image = tmp_path / "x.img"
    image.write_bytes(bytes(4096))
    with pytest.raises(DiskToolError, match="resize2fs"):
        e2fs.grow(rig.tools(), str(image))
    with pytest.raises(UnsupportedError) as missing:
        e2fs.find_tools("/usr/bin/bwrap", "") if not Path("/usr/sbin/mke2fs").exists() else _none()
    assert "e2fsprogs" in missing.value.remedy


def _none() -> Tools:
    original, e2fs.programs.SYSTEM_DIRECTORIES = e2fs.programs.SYSTEM_DIRECTORIES, ()
    try:
        return e2fs.find_tools("/usr/bin/bwrap")
    finally:
        e2fs.programs.SYSTEM_DIRECTORIES = original


def test_a_tool_that_talks_or_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile bytes make a tool print without end or wait for ever: memory and time are bounded."""
    image = tmp_path / "x.img"
    image.touch()
    monkeypatch.setattr(e2fs, "TIMEOUT_S", 1)
    code, said = e2fs.run(rig.tools(), str(image), ["/bin/sh", "-c", "yes loud"])
    assert code == -1
    assert "longer" in said
    code, _ = e2fs.run(rig.tools(), str(image), ["/bin/sh", "-c", "exec >/dev/null 2>&1; sleep 30"])
    assert code != 0


def test_holders_do_not_race(disk: Path) -> None:
    """Of many that start at once, exactly one holds the disk; the others have copies of their own."""
    program = (
        "import sys; from cloister.host import e2fs, vm_disks as v;"
        "d = v.hold_var_disk(e2fs.find_tools('/usr/bin/bwrap'), sys.argv[1], 64 << 20, spare=sys.argv[2]);"
        "print(d.path, flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, disk, f"{disk}.spare{number}"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for number in range(4)
    ]  # fmt: skip
    paths = [child.stdout.readline().strip() for child in children if child.stdout]
    for child in children:
        child.communicate()
    assert paths.count(str(disk)) == 1
    assert len(set(paths)) == 4
    assert vm_disks._lock(str(disk)) is not None
