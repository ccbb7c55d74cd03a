"""Workspace disks: what is in the host's directory is on them, and nothing that the agent may not see."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest
import vm_disk_rig as rig

from cloister.errors import RetryError, UnsupportedError
from cloister.host import e2fs, vm_baseline, vm_workspace
from cloister.host.ext4 import tree
from cloister.host.ext4.image import Image
from cloister.plan.workspace import Mount, Placeholder

pytestmark = pytest.mark.kernel

CANARY = b"canary-3f9c1d77-" * 8


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace."""
    made = tmp_path / "work"
    made.mkdir()
    return made


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where its disk goes."""
    return tmp_path / "workspace.img"


def test_a_workspace_is_on_its_disk_as_it_is(root: Path, disk: Path) -> None:
    """Files of all sizes, links, strange names: the same on the disk, and e2fsck finds it sound."""
    for size in (0, 1, 4095, 4096, 4097, 100_000, (1 << 20) + 1, 5 << 20):
        (root / f"size-{size}").write_bytes(os.urandom(size))
    (root / "a/b/c/d").mkdir(parents=True)
    (root / "a/b/c/d/e").write_text("deep")
    (root / "out").symlink_to("/etc/passwd")
    (root / "long").symlink_to("x/" * 400)
    for length in (58, 59, 60, 61):
        (root / f"link{length}").symlink_to("y" * length)
    (root / "new\nline").write_text("1")
    with open(os.fsencode(root) + b"/\xff\xfe latin", "wb") as file:
        file.write(b"2")
    (root / ("n" * 255)).write_text("3")
    made = rig.fill(root, disk)
    rig.check(disk)
    assert rig.seen(disk) == rig.on_host(root)
    assert made.entries == len(rig.on_host(root))
    assert disk.stat().st_mode & 0o777 == 0o600
    assert disk.stat().st_blocks * 512 < made.size_bytes / 4, "it is sparse"


def test_debugfs_reads_the_same(root: Path, disk: Path, tmp_path: Path) -> None:
    """Another reader, e2fsprogs', gets the same bytes, owners, times and modes from a disk."""
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o4755)
    os.utime(root / "run.sh", ns=(1, 1_234_567_890_123_456_789))
    rig.fill(root, disk)
    said = rig.debugfs(disk, "stat run.sh", f'dump run.sh "{tmp_path}/copy"', write=False)
    assert (tmp_path / "copy").read_text() == "#!/bin/sh\n"
    assert "Mode:  0755" in said, "set-id bits stay on the host"
    assert "User:  1000   Group:  1000" in said
    assert "mtime: 0x499602d2:1d6f3454" in said, "nanoseconds are kept"


def test_a_real_tree_comes_out_of_debugfs_as_it_went_in(root: Path, disk: Path, tmp_path: Path) -> None:
    """Hundreds of real files: e2fsprogs extract the same tree that our own reader sees, and that is on the host."""
    shutil.copytree(Path(vm_workspace.__file__).parent.parent, root / "tree", ignore=shutil.ignore_patterns("*.pyc"))
    rig.fill(root, disk)
    (tmp_path / "out").mkdir()
    rig.debugfs(disk, f'rdump /tree "{tmp_path}/out"', write=False)
    assert rig.on_host(tmp_path / "out") == rig.on_host(root) == rig.seen(disk)


def test_hard_links_and_holes_stay_what_they_are(root: Path, disk: Path) -> None:
    """Two names of one file are one file on the disk; a hole takes no room there."""
    (root / "one").write_text("shared")
    os.link(root / "one", root / "two")
    with (root / "holes").open("wb") as file:
        for at in range(0, 40 << 20, 4 << 20):
            file.seek(at)
            file.write(b"data")
        file.truncate(64 << 20)
    rig.fill(root, disk)
    rig.check(disk)
    assert rig.seen(disk) == rig.on_host(root)
    assert disk.stat().st_blocks * 512 < 8 << 20
    with Image(str(disk)) as image:
        one, two = tree.find(image, b"one"), tree.find(image, b"two")
    assert one is not None
    assert two is not None
    assert (one.number, one.links) == (two.number, 2)


def test_a_file_in_many_pieces_has_a_tree_of_extents(root: Path, disk: Path) -> None:
    """More pieces than an inode maps: the map grows a level, and e2fsck takes it."""
    with (root / "pieces").open("wb") as file:
        for index in range(2000):
            file.seek(index * 8192)
            file.write(b"%d" % index)
    rig.fill(root, disk)
    rig.check(disk)
    assert rig.seen(disk) == rig.on_host(root)


def test_no_byte_of_what_is_hidden_is_on_the_disk(root: Path, disk: Path) -> None:
    """Hidden files and directories are never read; an empty name stands for them. What is shown is there."""
    (root / "secrets").mkdir()
    (root / "secrets/key").write_bytes(CANARY)
    (root / ".env").write_bytes(CANARY)
    (root / "shown").write_bytes(CANARY[::-1])
    os.link(root / ".env", root / "other-name")
    shown = rig.layout(root, mounts=[rig.mask(root / ".env"), rig.mask(root / "secrets")])
    (root / "secrets").rename(root / "moved")
    made = rig.fill(root, disk, shown)
    data = disk.read_bytes()
    assert CANARY[:16] not in data
    assert CANARY[::-1] in data
    assert rig.seen(disk) == {b"secrets": None, b".env": b"", b"shown": CANARY[::-1]}
    assert made.fields == ("mask=.env", "mask=secrets")
    assert vm_baseline.load(str(disk)).kept == {b".env", b"other-name", b"moved"}


def test_protected_names_are_there_and_told(root: Path, disk: Path) -> None:
    """What the layout protects is named to the guest; what is absent is made on the disk, and not on the host."""
    (root / ".git/hooks").mkdir(parents=True)
    mounts = [
        Mount("ro", f"{root}/.git/hooks", f"{root}/.git/hooks"),
        Mount("pin", f"{root}/.cargo", f"{root}/.cargo"),
        Mount("content", f"{root}/.cargo/config.toml", content="# kept\n"),
        Mount("ro", "/elsewhere/.git", "/elsewhere/.git"),
    ]
    node = rig.Node("directory")
    placeholders = [
        Placeholder(str(root), node, ".cargo", "directory"),
        Placeholder(str(root), node, ".cargo/config.toml", "socket"),
    ]
    made = rig.fill(root, disk, rig.layout(root, mounts=mounts, placeholders=placeholders))
    rig.check(disk)
    assert made.fields == ("ro=.git/hooks", f"stand={b'# kept'.hex()}0a:.cargo/config.toml")
    with Image(str(disk)) as image:
        kinds = {path: stat.S_IFMT(inode.mode) for path, inode in tree.walk(image)}
    assert kinds[b".cargo/config.toml"] == stat.S_IFSOCK  # which git takes for nothing; the guest shows the file there
    assert not (root / ".cargo").exists()
    assert any("/elsewhere/.git" in notice for notice in made.notices)


def test_what_cannot_be_copied_is_left_out_and_said(root: Path, disk: Path) -> None:
    """Sockets, FIFOs and what the user cannot read do not stop a run; they are counted. What can be read is there."""
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(root / "socket"))
    (root / "closed").write_text("x")
    (root / "closed").chmod(0)
    (root / "readable").write_text("y")
    (root / "listed").mkdir()
    (root / "listed/beneath").write_text("z")
    (root / "listed").chmod(0o400)
    made = rig.fill(root, disk)
    (root / "listed").chmod(0o700)
    found = rig.seen(disk)
    if os.geteuid():
        assert set(found) == {b"readable", b"listed"}
        assert vm_baseline.load(str(disk)).kept == {b"closed", b"listed/beneath"}
    assert b"readable" in found
    assert not {b"pipe", b"socket"} & set(found)
    assert any("2 sockets, FIFOs" in notice for notice in made.notices)


def test_a_directory_of_many_names_has_an_index(root: Path, disk: Path) -> None:
    """A guest finds a name among thousands by its hash; the index is e2fsck's, and no lost+found stays of it."""
    for index in range(3000):
        (root / f"a-name-of-some-length-{index}").write_bytes(b"")
    rig.fill(root, disk)
    rig.check(disk)
    assert "Hash Version" in rig.debugfs(disk, "htree_dump /", write=False)
    assert rig.seen(disk) == rig.on_host(root)


def test_the_baseline_is_what_is_on_the_disk(root: Path, disk: Path) -> None:
    """Each record is what the reader finds in the finished image, to the nanosecond."""
    (root / "d/e").mkdir(parents=True)
    (root / "d/f").write_text("text")
    (root / "d/l").symlink_to("f")
    rig.fill(root, disk)
    baseline = vm_baseline.load(str(disk))
    with Image(str(disk)) as image:
        found = {
            path: (one.number, one.mode, 0 if one.is_directory else one.size, one.mtime_ns, one.ctime_ns)
            for path, one in tree.walk(image)
        }
    assert {path: was[:5] for path, was in baseline.entries.items()} == found


def test_a_workspace_that_changes_meanwhile_is_copied_as_it_was_met(
    root: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that go or turn into links under the copier's hands are left out; it neither fails nor follows them."""
    (root / "goes").write_text("1")
    (root / "turns").write_text("2")
    (root / "stays").write_text("3")
    (root.parent / "outside").write_bytes(CANARY)
    copy = vm_workspace._Copier._entry

    def entry(self, opened, text, *rest):  # the moment between the list of names and each name
        if text == "goes":
            (root / "goes").unlink()
        if text == "turns":
            (root / "turns").unlink()
            (root / "turns").symlink_to(root.parent / "outside")
        return copy(self, opened, text, *rest)

    monkeypatch.setattr(vm_workspace._Copier, "_entry", entry)
    rig.fill(root, disk)
    rig.check(disk)
    found = rig.seen(disk)
    assert found == {b"stays": b"3", b"turns": ("link", os.fsencode(root.parent / "outside"))}
    assert CANARY not in disk.read_bytes()


def test_a_workspace_that_is_a_link_is_refused(root: Path, disk: Path) -> None:
    """A workspace that was replaced by a link is followed nowhere, and leaves no disk."""
    link = root.parent / "link"
    link.symlink_to(root)
    with pytest.raises(RetryError):
        rig.fill(link, disk)
    assert not disk.exists()


def test_too_much_is_refused(root: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More names than are handed back are not given out either."""
    for index in range(5):
        (root / str(index)).write_text("")
    monkeypatch.setattr(vm_workspace, "MAX_ENTRIES", 4)
    with pytest.raises(UnsupportedError, match="more than 4 entries"):
        rig.fill(root, disk)
    assert not disk.exists()


def test_the_jail_has_one_file(tmp_path: Path) -> None:
    """e2fsprogs run where nothing is but the system's programs and the image: no network, home, device, /proc."""
    image = tmp_path / "x.img"
    image.write_bytes(b"image")
    tools = rig.tools()
    probe = (
        "import os; print(open('/disk.img').read(), *os.listdir('/'));"
        "[print(place, *os.listdir(place)) for place in ('/home', '/root', '/etc', '/proc', '/dev', '/sys', '/tmp')"
        " if os.path.isdir(place)]"
    )
    code, said = e2fs.run(tools, str(image), ["/usr/bin/python3", "-I", "-S", "-c", probe])
    assert said.startswith("image")
    listed = said.split()
    assert not {"home", "root", "proc", "dev", "sys", "tmp"} & set(listed)
    assert code == 0
    code, _ = e2fs.run(tools, str(image), ["/bin/sh", "-c", "echo x >/usr/x || echo y >/disk.img"])
    assert image.read_bytes() == b"y\n"


def test_a_killed_copier_leaves_what_the_next_one_replaces(root: Path, disk: Path) -> None:
    """A disk appears when it is whole; half of one, from a process that died, is in nobody's way."""
    (root / "file").write_text("x")
    Path(f"{disk}.partial").write_bytes(b"half")
    rig.fill(root, disk)
    assert rig.seen(disk) == {b"file": b"x"}
    assert not Path(f"{disk}.partial").exists()


def test_no_lost_and_found(root: Path, disk: Path) -> None:
    """The root belongs to the agent's user and shows what the host's directory has, nothing else."""
    rig.fill(root, disk)
    assert rig.seen(disk) == {}
    with Image(str(disk)) as image:
        top = image.inode(2)
    assert (top.uid, top.gid) == (1000, 1000)
    assert subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=False).returncode == 0
