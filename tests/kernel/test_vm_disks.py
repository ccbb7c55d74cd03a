"""The disk that an agent keeps: made once, grown, repaired, and written by one virtual machine at a time."""

from __future__ import annotations

import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import vm_disk_rig as rig

from cloister.errors import UnsupportedError
from cloister.host import e2fs, vm_disks
from cloister.host.e2fs import DiskToolError, Filters, Tools
from cloister.host.vm_disks import HeldDisk, hold_var_disk
from cloister.host.vm_image import superblock

pytestmark = pytest.mark.kernel

SIZE = 64 << 20
ALLOW_ALL = struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)


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
        _none()
    assert "e2fsprogs" in missing.value.remedy


def _none() -> Tools:
    original, e2fs.programs.SYSTEM_DIRECTORIES = e2fs.programs.SYSTEM_DIRECTORIES, ()
    try:
        return e2fs.find_tools("/usr/bin/bwrap", Filters(ALLOW_ALL, ALLOW_ALL))
    finally:
        e2fs.programs.SYSTEM_DIRECTORIES = original


def test_a_tool_that_talks_or_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile bytes make a tool print without end or wait for ever: memory and time are bounded."""
    image = tmp_path / "x.img"
    image.touch()
    monkeypatch.setattr(e2fs, "TIMEOUT_S", 1)
    code, said = e2fs.run(rig.tools(), str(image), ["/usr/bin/yes", "loud"])
    assert code == -1
    assert "longer" in said
    code, _ = e2fs.run(rig.tools(), str(image), ["/bin/sh", "-c", "exec >/disk.img 2>&1; exec sleep 30"])
    assert code != 0


# Runs in the jail: tries what no program that works on one file needs; prints what was not refused.
ATTACK = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
left = []
def call(name, number, *words):
    ctypes.set_errno(0)
    if libc.syscall(*[ctypes.c_ulong(word) for word in (number, *words, 0, 0, 0, 0, 0)[:7]]) != -1 or \
            ctypes.get_errno() != errno.ENOSYS:
        left.append(name)
CALLS = {}
for name, (number, *words) in CALLS.items():
    call(name, number, *words)
for family in range(1, 46):
    for kind in (1, 2, 3, 5):
        try:
            socket.socket(family, kind).close()
            left.append(f"socket {family} {kind}")
        except OSError as error:
            if error.errno != errno.ENOSYS:
                left.append(f"socket {family} {kind}")
try:
    if os.fork() == 0:
        os._exit(0)
    left.append("fork")
except OSError as error:
    pass
print("left:", *left)
"""
REFUSED = {
    "socketpair": (53, 199, 1, 1), "connect": (42, 203), "bind": (49, 200), "ptrace": (101, 117), "mount": (165, 40),
    "umount2": (166, 39), "unshare": (272, 97, 0x10000000), "setns": (308, 268), "clone3": (435, 435),
    "clone for a process": (56, 220, 17), "clone for a namespace": (56, 220, 0x10000011), "vfork": (58, -1),
    "pivot_root": (155, 41), "chroot": (161, 51), "keyctl": (250, 219), "add_key": (248, 217), "bpf": (321, 280),
    "io_uring_setup": (425, 425, 8), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "ioctl": (16, 29),
    "kill": (62, 129, 1), "tgkill": (234, 131), "pidfd_open": (434, 434, 1), "process_vm_readv": (310, 270),
    "open_by_handle_at": (304, 265), "memfd_create": (319, 279), "seccomp": (317, 277), "personality": (135, 92),
    "prctl": (157, 167, 4, 1), "execveat": (322, 281), "mknodat": (259, 33), "init_module": (175, 105),
    "splice": (275, 76), "inotify_init1": (294, 26), "fanotify_init": (300, 262), "setuid": (105, 146),
    "fchmodat": (268, 53), "rename": (82, -1), "unlinkat": (263, 35), "shmget": (29, 194), "msgget": (68, 186),
    "landlock_create_ruleset": (444, 444), "prlimit64 of another": (302, 261, 1), "setxattr": (188, 5),
}  # fmt: skip


def test_nothing_but_file_work_can_be_asked_of_the_kernel_in_the_jail(tmp_path: Path) -> None:
    """A takeover of e2fsck finds no socket of any family, process, namespace, mount, key, ring, trace or signal."""
    image = tmp_path / "x.img"
    image.touch()
    column = 0 if platform.machine() == "x86_64" else 1
    calls = {name: (both[column], *both[2:]) for name, both in REFUSED.items() if both[column] >= 0}
    script = ATTACK.replace("CALLS = {}", f"CALLS = {calls!r}")
    code, said = e2fs.run(rig.tools(), str(image), ["/usr/bin/python3", "-I", "-S", "-c", script])
    assert (code, said) == (0, "left:")


def test_it_is_the_filter_that_refuses(tmp_path: Path) -> None:
    """The same attack in a jail whose filter lets everything pass finds a lot: the test above can fail."""
    image = tmp_path / "x.img"
    image.touch()
    wide = rig.tools_with(tool=ALLOW_ALL)
    code, said = e2fs.run(wide, str(image), ["/usr/bin/python3", "-I", "-S", "-c", ATTACK])
    assert code == 0
    assert "socket 1 1" in said
    assert "fork" in said


def test_a_jail_without_a_filter_is_never_made(tmp_path: Path) -> None:
    """An empty filter, or half an instruction, is refused before anything runs."""
    image = tmp_path / "x.img"
    image.touch()
    for none in (b"", ALLOW_ALL[:4]):
        with pytest.raises(DiskToolError, match="filter"):
            e2fs.run(rig.tools_with(tool=none), str(image), ["/bin/true"])


def test_holders_do_not_race(disk: Path) -> None:
    """Of many that start at once, exactly one holds the disk; the others have copies of their own."""
    program = (
        "import sys; from cloister.host import vm_disks as v; from cloister.runs.disk_tools import disk_tools as t;"
        "d = v.hold_var_disk(t('/usr/bin/bwrap'), sys.argv[1], 64 << 20, spare=sys.argv[2]);"
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
