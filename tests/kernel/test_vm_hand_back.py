"""What a guest changed on its disk comes back as a review knows it, and nothing that it should not be able to do."""

from __future__ import annotations

import functools
import os
import stat
import struct
import subprocess
import time
from pathlib import Path

import pytest
import vm_disk_rig as rig

from cloister.errors import CloisterError, DeniedError, StepError, UnsupportedError, UsageError
from cloister.host import overlay_apply, vm_hand_back, vm_take
from cloister.host.overlay_apply import Permission
from cloister.host.overlay_review import open_review
from cloister.host.vm_copy import take_out
from cloister.host.vm_hand_back import HandBack, hand_back
from cloister.plan.changes import Change

pytestmark = pytest.mark.kernel


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace with a few things."""
    made = tmp_path / "work"
    (made / "src/deep").mkdir(parents=True)
    (made / "README").write_text("hello\n")
    (made / "src/a.py").write_text("a = 1\n")
    (made / "src/b.py").write_text("b = 1\n")
    (made / "src/deep/c.py").write_text("c = 1\n")
    (made / "link").symlink_to("README")
    return made


@pytest.fixture
def disk(root: Path, tmp_path: Path) -> Path:
    """Its disk."""
    target = tmp_path / "workspace.img"
    rig.fill(root, target)
    return target


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    """Where changes go."""
    return tmp_path / "overlay/upper"


def back(disk: Path, upper: Path) -> HandBack:
    """Hand back with this machine's programs."""
    return hand_back(rig.tools(), str(disk), str(upper), root=str(disk.parent / "work"))


def changes(root: Path, upper: Path) -> list[Change]:
    """What the review says."""
    with open_review(str(root), str(upper), names=[".vscode"], since_ns=time.time_ns()) as review:
        return review.changes()


def told(root: Path, upper: Path) -> dict[str, str]:
    """Path and kind of change."""
    return {change.path: change.op for change in changes(root, upper)}


def test_an_untouched_disk_is_no_change(root: Path, disk: Path, upper: Path) -> None:
    """What the guest only read comes back as nothing."""
    assert back(disk, upper) == HandBack(0)
    assert told(root, upper) == {}


def test_changes_are_reviewed_and_applied(root: Path, disk: Path, upper: Path, tmp_path: Path) -> None:
    """New, changed, deleted and replaced names are what the review says; applied, the host has what the guest had."""
    rig.write(disk, "/src/a.py", b"a = 2\n", scratch=tmp_path)
    rig.write(disk, "/new.txt", b"new\n", scratch=tmp_path)
    rig.debugfs(disk, "rm /src/b.py", "mkdir /made", "symlink /made/points ../README", "rm /link", "mkdir /link")
    rig.check(disk)
    result = back(disk, upper)
    assert told(root, upper) == {
        "src/a.py": "modified", "new.txt": "added", "src/b.py": "deleted", "made": "added", "made/points": "added",
        "link": "replaced",
    }  # fmt: skip
    assert result == HandBack(6)
    with open_review(str(root), str(upper), names=(), since_ns=time.time_ns()) as review:
        outcomes = overlay_apply.apply(review, review.changes(), Permission())
    assert {outcome.result for outcome in outcomes} == {"applied"}
    assert rig.on_host(root) == rig.seen(disk)


def test_a_deleted_tree_is_one_change(root: Path, disk: Path, upper: Path) -> None:
    """A directory that is gone is deleted as a whole; its neighbours are not touched."""
    rig.debugfs(disk, "rm /src/deep/c.py", "rmdir /src/deep")
    back(disk, upper)
    assert told(root, upper) == {"src/deep": "deleted"}


def test_modes_come_back_and_set_id_bits_do_not(root: Path, disk: Path, upper: Path) -> None:
    """A chmod in the guest is a change of mode; no file of the guest's is ever set-user-id on the host."""
    rig.debugfs(disk, "sif /README mode 0106755", "sif /README ctime 20300101000000", "sif /src mode 0040700")
    back(disk, upper)
    found = {change.path: change.mode for change in changes(root, upper)}
    assert found == {"README": 0o755, "src": 0o700}
    assert not any(path.lstat().st_mode & 0o7000 for path in upper.rglob("*"))


def test_only_files_directories_and_links_come_back(root: Path, disk: Path, upper: Path) -> None:
    """Devices, FIFOs and sockets of a guest are left out and named; what lies beside them comes back."""
    rig.debugfs(
        disk, "mknod dev-sda b 8 0", "mknod tty c 5 0", "mknod pipe p", "mkdir fine", "rm README",
        "mknod README c 1 3",
    )  # fmt: skip
    result = back(disk, upper)
    assert told(root, upper) == {"fine": "added"}
    assert "dev-sda" in result.notices[0]
    kinds = {stat.S_IFMT(path.lstat().st_mode) for path in upper.rglob("*")}
    assert kinds == {stat.S_IFDIR}


def test_hard_links_and_holes_take_no_more_room_than_in_the_guest(
    root: Path, disk: Path, upper: Path, tmp_path: Path
) -> None:
    """A file of many names is written once; a hole is a hole."""
    source = tmp_path / "holes"
    with source.open("wb") as file:
        file.write(b"start")
        file.truncate(1 << 30)
    rig.debugfs(disk, f'write "{source}" /holes', "ln /holes /again", "sif /holes links_count 2")
    back(disk, upper)
    assert (upper / "holes").stat().st_size == 1 << 30
    assert (upper / "holes").stat().st_ino == (upper / "again").stat().st_ino
    assert (upper / "holes").stat().st_blocks * 512 < 1 << 20


def test_what_was_hidden_is_never_touched(root: Path, tmp_path: Path, upper: Path) -> None:
    """A guest can neither change nor delete what it was not shown, nor the directory that it lies in."""
    (root / "conf").mkdir()
    (root / "conf/secret").write_text("s")
    (root / "conf/plain").write_text("p")
    disk = tmp_path / "hidden.img"
    rig.fill(root, disk, rig.layout(root, mounts=[rig.mask(root / "conf/secret")]))
    rig.debugfs(disk, "rm /conf/plain", "rm /conf/secret", "rmdir /conf", "rm /README")
    back(disk, upper)
    assert told(root, upper) == {"conf/plain": "deleted", "README": "deleted"}
    rig.debugfs(disk, "mkdir /conf")
    rig.write(disk, "/conf/secret", b"forged", scratch=tmp_path)
    overlay_apply.discard(str(upper.parent))
    result = back(disk, upper)
    assert "conf/secret" not in told(root, upper)
    assert "conf/secret" in result.notices[0], "the person is told"
    rig.debugfs(disk, "rm /conf/secret", "rmdir /conf")
    rig.write(disk, "/conf", b"a file", scratch=tmp_path)
    overlay_apply.discard(str(upper.parent))
    result = back(disk, upper)
    assert told(root, upper) == {"conf/plain": "deleted", "README": "deleted"}
    assert "conf" in result.notices[0]
    assert "hides one of yours" in result.notices[0]


def test_protected_names_ask_and_leading_out_too(root: Path, disk: Path, upper: Path, tmp_path: Path) -> None:
    """A root user in the guest writes what it likes on its disk; the review still asks for what it always asks for."""
    rig.debugfs(disk, "mkdir /.vscode", "symlink /away /etc/shadow", "mkdir /.git", "mkdir /.git/hooks")
    rig.write(disk, "/.vscode/settings.json", b"{}", scratch=tmp_path)
    rig.write(disk, "/.git/hooks/pre-commit", b"#!/bin/sh\n", scratch=tmp_path)
    back(disk, upper)
    asked = {change.path for change in changes(root, upper) if change.asks}
    assert {"away", ".vscode", ".vscode/settings.json", ".git/hooks/pre-commit"} <= asked


def test_an_unclean_disk_is_replayed_on_a_copy(root: Path, disk: Path, upper: Path, tmp_path: Path) -> None:
    """A guest that died leaves a journal: it is replayed in the jail, and the disk itself stays as it was."""
    rig.write(disk, "/late", b"late\n", scratch=tmp_path)
    rig.debugfs(disk, "feature needs_recovery", "dirty")
    before = disk.read_bytes()[: 1 << 16]
    back(disk, upper)
    assert told(root, upper) == {"late": "added"}
    assert disk.read_bytes()[: 1 << 16] == before
    assert not Path(f"{disk}.replayed").exists()


def test_a_disk_that_is_damaged_is_refused_and_kept(root: Path, disk: Path, upper: Path) -> None:
    """Nothing half comes of a disk that cannot be read; it stays for whoever wants to look."""
    with disk.open("r+b") as file:
        file.seek(1024 + 56)
        file.write(b"\0\0")
    with pytest.raises(DeniedError):
        back(disk, upper)
    assert disk.exists()
    assert not upper.exists()


def test_without_its_baseline_nothing_is_handed_back(root: Path, disk: Path, upper: Path) -> None:
    """What cannot be compared is refused: everything would look new, and nothing deleted."""
    Path(f"{disk}.baseline").unlink()
    with pytest.raises(DeniedError):
        back(disk, upper)
    Path(f"{disk}.baseline").write_bytes(b"\x93")
    with pytest.raises(DeniedError):
        back(disk, upper)


def test_room_and_number_are_bounded(
    root: Path, disk: Path, upper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More bytes than may be used, or more names than are reviewed, are refused; the next try with room works."""
    rig.write(disk, "/big", os.urandom(100_000), scratch=tmp_path)
    rig.write(disk, "/other", b"x", scratch=tmp_path)
    with pytest.raises(UnsupportedError) as refused:
        hand_back(rig.tools(), str(disk), str(upper), root=str(root), room_bytes=50_000)
    assert refused.value.reference == "vm-hand-back"
    assert not upper.exists()
    monkeypatch.setattr(vm_hand_back, "MAX_CHANGES", 1)
    with pytest.raises(UnsupportedError, match="more than 1 paths"):
        back(disk, upper)
    monkeypatch.undo()
    assert back(disk, upper).changes == 2


def test_a_try_that_was_cut_short_is_begun_anew(root: Path, disk: Path, upper: Path, tmp_path: Path) -> None:
    """What a killed process left is removed by the next try, whatever modes it has."""
    rig.write(disk, "/new", b"x", scratch=tmp_path)
    left = upper.parent / ".upper.partial/deep"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    left.chmod(0)
    back(disk, upper)
    assert told(root, upper) == {"new": "added"}
    assert [path.name for path in upper.parent.iterdir()] == ["upper"]


def test_a_file_or_a_directory_is_read_off_a_stopped_disk(root: Path, disk: Path, tmp_path: Path) -> None:
    """What is asked for can be had without the rest, holes and long names included; links carry nothing."""
    deep = "d" * 200 + "/" + "e" * 200
    rig.debugfs(disk, f"mkdir {'d' * 200}", f"mkdir {deep}", "symlink /src/out /etc/passwd")
    rig.write(disk, f"/{deep}/file", b"far", scratch=tmp_path)
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"middle")
    rig.debugfs(disk, f"write {sparse} sparse")

    def take(name: bytes, target: Path) -> tuple[int, tuple[str, ...]]:
        read = functools.partial(take_out, target=str(target), most_bytes=8 << 20)
        return vm_take.take_off(rig.tools(), str(disk), name, read)

    assert take(b"src/a.py", tmp_path / "one") == (1, ())
    assert (tmp_path / "one").read_bytes() == b"a = 1\n"
    assert take(b"/src/", tmp_path / "all") == (5, ("src/out",))
    assert rig.on_host(tmp_path / "all") == rig.on_host(root / "src")
    take(b"d" * 200, tmp_path / "far")
    assert (tmp_path / "far" / ("e" * 200) / "file").read_bytes() == b"far"
    take(b"sparse", tmp_path / "holes")
    assert (tmp_path / "holes").read_bytes() == sparse.read_bytes()
    for name in (b"link", b"nothing", b"../../etc/passwd", b"README/x", b"src/out", b""):
        with pytest.raises(UsageError):
            take(name, tmp_path / "none")
    with pytest.raises(StepError, match="more than 1000 bytes"):
        vm_take.take_off(
            rig.tools(), str(disk), b"sparse",
            functools.partial(take_out, target=str(tmp_path / "none"), most_bytes=1000),
        )  # fmt: skip
    assert not (tmp_path / "none").exists()


def test_directories_keep_the_hosts_modes(root: Path, tmp_path: Path, upper: Path) -> None:
    """A directory in which something changed is no change itself, also with bits that a guest never sees."""
    (root / "src").chmod(0o2775)
    disk = tmp_path / "again.img"
    rig.fill(root, disk)
    rig.write(disk, "/src/a.py", b"a = 3\n", scratch=tmp_path)
    back(disk, upper)
    assert told(root, upper) == {"src/a.py": "modified"}


def test_names_of_all_kinds_come_back(root: Path, disk: Path, upper: Path) -> None:
    """Names that are no UTF-8, and those with a newline, are names."""
    rig.debugfs(disk, "mkdir /plain")
    data = bytearray(disk.read_bytes())
    at = data.find(b"plain")
    while at >= 0:
        data[at : at + 5] = b"\xff\n\x1b\xfe!"
        at = data.find(b"plain", at)
    disk.write_bytes(data)
    back(disk, upper)
    assert [os.fsencode(change.path) for change in changes(root, upper)] == [b"\xff\n\x1b\xfe!"]


@pytest.mark.parametrize("name", [b"..", b".", b"a/b", b"a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(root: Path, disk: Path, upper: Path, name: bytes) -> None:
    """A name with a slash or a NUL is refused; `.` and `..` are no names. Nothing is written outside."""
    rig.debugfs(disk, "mkdir /" + "q" * len(name) + "zzz")
    data = bytearray(disk.read_bytes())
    at = data.find(b"q" * len(name) + b"zzz")
    data[at - 2] = len(name)
    data[at : at + len(name)] = name
    disk.write_bytes(data)
    if name in {b".", b".."}:
        assert back(disk, upper).changes == 0
    else:
        with pytest.raises(DeniedError):
            back(disk, upper)
    assert not (upper.parent.parent / "b").exists()


def test_a_directory_inside_itself_is_refused(root: Path, disk: Path, upper: Path) -> None:
    """A circle of directories ends the walk with a clear refusal."""
    rig.debugfs(disk, "ln /src /src/deep/loop")
    with pytest.raises(DeniedError, match="circles"):
        back(disk, upper)


def test_an_extent_tree_that_points_at_itself_is_refused(root: Path, disk: Path, upper: Path, tmp_path: Path) -> None:
    """A node that is its own child is met once."""
    rig.write(disk, "/big", os.urandom(8192), scratch=tmp_path)
    said = rig.debugfs(disk, "imap /big", write=False)
    block, offset = (int(word.strip(",() "), 0) for word in (said.split()[-3], said.split()[-1]))
    free = int(rig.debugfs(disk, "ffb", write=False).split()[-1])
    node = struct.pack("<HHHHI", 0xF30A, 1, 4, 2, 0) + struct.pack("<IIHH", 0, free, 0, 0)
    with disk.open("r+b") as file:
        file.seek(block * 4096 + offset + 40)
        file.write(node)
        file.seek(free * 4096)
        file.write(node)
    with pytest.raises(DeniedError, match="circles"):
        back(disk, upper)


def test_a_killed_hand_back_can_be_done_again(root: Path, disk: Path, upper: Path, tmp_path: Path) -> None:
    """Killed at any moment, it leaves the disk and no upper directory, or all of it; the next one says the same."""
    for index in range(60):
        (root / f"f{index}").write_text("x" * index)
    rig.fill(root, disk)
    with disk.open("r+b"):
        rig.debugfs(disk, *[f"sif /f{index} size {index + 1}" for index in range(60)])
    program = (
        "import sys; from cloister.host import vm_hand_back as v; from cloister.runs.disk_tools import disk_tools as t;"
        "v.hand_back(t('/usr/bin/bwrap'), sys.argv[1], sys.argv[2], root=sys.argv[3])"
    )
    for delay in (0.05, 0.12, 0.16, 0.2, 0.25, 0.35, 0.5):
        child = subprocess.Popen(
            [os.environ.get("CLOISTER_PYTHON", os.sys.executable), "-c", program, disk, upper, root],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, os.sys.path))},
        )
        time.sleep(delay)
        child.kill()
        child.wait()
        assert disk.exists()
        if upper.exists():
            overlay_apply.discard(str(upper.parent))
    back(disk, upper)
    assert len(told(root, upper)) == 60


def test_any_error_is_one_that_people_can_read(disk: Path, upper: Path) -> None:
    """A disk of length nought, or of noise, is refused with words."""
    for content in (b"", os.urandom(4096)):
        disk.write_bytes(content)
        with pytest.raises(CloisterError):
            back(disk, upper)
