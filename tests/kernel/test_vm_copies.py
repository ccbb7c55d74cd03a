"""Files out of a guest that lies about them, and snapshots of disks: nothing is followed, nothing half done is left."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import tarfile
import time
from pathlib import Path

import pytest

from cloister.errors import StepError, UsageError
from cloister.host import vm_copy, vm_snapshot
from cloister.plan.vm_snapshot import Disk, Snapshot

pytestmark = pytest.mark.kernel


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    """Return a tar of these members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
    stream.seek(0)
    return stream


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    """Return one member."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mode = kind, len(data), link, 0o6755
    return info, data


def test_a_file_and_a_directory_come_out(tmp_path: Path) -> None:
    """A file gets the name that was asked for, or its own in a directory; no mode of the guest gives more than x."""
    vm_copy.take_out(tar(member("a.txt", b"hello")), str(tmp_path / "b.txt"), most_bytes=100)
    assert (tmp_path / "b.txt").read_bytes() == b"hello"
    assert (tmp_path / "b.txt").stat().st_mode & 0o7777 == 0o700
    vm_copy.take_out(tar(member("d", kind=tarfile.DIRTYPE), member("d/e/f", b"x")), str(tmp_path), most_bytes=100)
    assert (tmp_path / "d/e/f").read_bytes() == b"x"
    assert sorted(os.listdir(tmp_path)) == ["b.txt", "d"]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..", "a/..", "."])
def test_paths_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    """A guest cannot choose where its files go."""
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(StepError):
        vm_copy.take_out(tar(member(name, b"x")), str(inside), most_bytes=100)
    assert list(inside.iterdir()) == []
    assert list(tmp_path.iterdir()) == [inside]


def test_links_and_devices_are_left_out(tmp_path: Path) -> None:
    """A link, then a file through it: the link is not made, so nothing is written where it leads."""
    target = tmp_path / "outside"
    target.mkdir()
    stream = tar(
        member("d", kind=tarfile.DIRTYPE),
        member("d/link", kind=tarfile.SYMTYPE, link=str(target)),
        member("d/link/file", b"x"),
        member("d/hard", kind=tarfile.LNKTYPE, link="/etc/passwd"),
        member("d/device", kind=tarfile.CHRTYPE),
        member("d/pipe", kind=tarfile.FIFOTYPE),
    )
    _, left = vm_copy.take_out(stream, str(tmp_path / "copy"), most_bytes=100)
    assert left == ("d/link", "d/hard", "d/device", "d/pipe")
    assert list(target.iterdir()) == []
    assert (tmp_path / "copy/link/file").read_bytes() == b"x"
    assert not (tmp_path / "copy/link").is_symlink()


@pytest.mark.parametrize("kind", ["bytes", "entries", "name", "noise", "nothing"])
def test_too_much_and_nonsense_leave_nothing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More bytes or files than allowed, a name without an end, no tar at all: refused, and nothing is left."""
    monkeypatch.setattr(vm_copy, "MAX_ENTRIES", 10)
    huge = tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT)
    long_name = tarfile.TarInfo("x")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    streams = {
        "bytes": tar(member("d/a", bytes(60)), member("d/b", bytes(60))),
        "entries": tar(*[member(f"d/{index}") for index in range(20)]),
        "name": io.BytesIO(long_name.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 16)),
        "noise": io.BytesIO(os.urandom(4096)),
        "nothing": io.BytesIO(b""),
    }
    assert len(huge) == 512
    with pytest.raises(StepError):
        vm_copy.take_out(streams[kind], str(tmp_path / "copy"), most_bytes=100)
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_is_there_is_replaced_by_a_directory(tmp_path: Path) -> None:
    """A directory of the guest does not take the place of one that is there."""
    (tmp_path / "d").mkdir()
    with pytest.raises(UsageError):
        vm_copy.take_out(tar(member("d", kind=tarfile.DIRTYPE)), str(tmp_path), most_bytes=100)
    assert sorted(os.listdir(tmp_path)) == ["d"]


def test_what_goes_in_is_not_followed(tmp_path: Path) -> None:
    """A link below what is copied in goes in as a link; sockets and set-uid bits do not."""
    source = tmp_path / "s"
    source.mkdir()
    (source / "link").symlink_to("/etc/passwd")
    (source / "tool").write_bytes(b"x")
    (source / "tool").chmod(0o4755)
    os.mkfifo(source / "pipe")
    stream = io.BytesIO()
    vm_copy.send_in(stream, str(source))
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        found = {one.name: (one.issym(), one.mode) for one in archive}
    assert found["it/link"][0]
    assert found["it/tool"] == (False, 0o755)
    assert "it/pipe" not in found


@pytest.fixture
def disks(tmp_path: Path) -> dict[str, str]:
    """Two disks with something on them."""
    paths = {}
    for name, at in (("var", 5 << 20), ("workspace", 0)):
        path = tmp_path / f"{name}.img"
        with path.open("wb") as file:
            file.truncate(64 << 20)
            file.seek(at)
            file.write(name.encode() * 1000)
        paths[name] = str(path)
    return paths


def describe(name: str, disks: tuple[Disk, ...], paused_s: float) -> Snapshot:
    """Return a record."""
    return Snapshot(
        name=name, run="1" * 12, agent="a", profile="", workspace="/w", asked=("true",), image="test", version=1,
        manifest="0" * 64, made=1.0, paused_s=paused_s, fields=(), disks=disks,
    )  # fmt: skip


def take(root: Path, disks: dict[str, str], name: str = "one") -> Snapshot:
    """Take a snapshot of a machine that stands still anyway."""
    return vm_snapshot.take(
        str(root), name, disks, lambda copies, paused: describe(name, copies, paused), contextlib.nullcontext
    )


def test_a_snapshot_is_what_the_disks_were(tmp_path: Path, disks: dict[str, str]) -> None:
    """What is restored is what was there, not what the disks have become; and it is sparse as they were."""
    root = tmp_path / "snapshots"
    was = {name: Path(path).read_bytes() for name, path in disks.items()}
    record = take(root, disks)
    Path(disks["var"]).write_bytes(b"changed")
    targets = {name: str(tmp_path / f"new-{name}") for name in disks}
    vm_snapshot.restore(str(root), vm_snapshot.read(str(root), "one"), targets)
    assert {name: Path(path).read_bytes() for name, path in targets.items()} == was
    assert Path(targets["var"]).stat().st_blocks * 512 < 1 << 20
    assert [one.name for one in vm_snapshot.every(str(root))] == ["one"]
    assert {path.stat().st_mode & 0o777 for path in (root / "one").iterdir()} == {0o400}
    assert record.disks[0].size == 64 << 20


def test_a_changed_snapshot_is_refused(tmp_path: Path, disks: dict[str, str]) -> None:
    """One changed byte in a disk, and nothing is started from it: no copy is left."""
    root = tmp_path / "snapshots"
    record = take(root, disks)
    path = root / "one/workspace"
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"X")
    targets = {name: str(tmp_path / f"new-{name}") for name in disks}
    with pytest.raises(StepError) as caught:
        vm_snapshot.restore(str(root), record, targets)
    assert caught.value.reference == "snapshot-changed"
    assert not list(tmp_path.glob("new-*"))


@pytest.mark.parametrize("name", ["", "..", "../x", ".making-x", "A", "a/b", "a" * 64, "x\n"])
def test_names_that_are_paths_are_none(tmp_path: Path, disks: dict[str, str], name: str) -> None:
    """A snapshot's name is one component, never hidden."""
    with pytest.raises(UsageError):
        take(tmp_path / "snapshots", disks, name)


def test_a_name_is_taken_once(tmp_path: Path, disks: dict[str, str]) -> None:
    """A second snapshot of a name is refused; after its removal there is none."""
    root = tmp_path / "snapshots"
    take(root, disks)
    with pytest.raises(UsageError):
        take(root, disks)
    vm_snapshot.remove(str(root), "one")
    assert list(root.iterdir()) == []
    assert take(root, disks)


def test_a_maker_of_snapshots_that_is_killed_leaves_nothing_that_counts(tmp_path: Path, disks: dict[str, str]) -> None:
    """Killed while the machine stands still or while it is hashed: there is no snapshot, and the name is free."""
    root = tmp_path / "snapshots"

    @contextlib.contextmanager
    def held():  # type: ignore[no-untyped-def]
        yield
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        vm_snapshot.take(str(root), "one", disks, lambda copies, paused: describe("one", copies, paused), held)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    time.sleep(0.05)
    assert list(vm_snapshot.every(str(root))) == []
    vm_snapshot.tidy(str(root))
    assert list(root.iterdir()) == []
    assert take(root, disks)


def test_a_fork_that_is_killed_leaves_its_snapshot_to_be_tidied_up(tmp_path: Path, disks: dict[str, str]) -> None:
    """What `vm fork` keeps for itself goes when nobody holds it; while somebody does, or may soon, it stays."""
    root = tmp_path / "snapshots"
    held, young, left = (vm_snapshot.throwaway_name() for _ in range(3))
    for name in (held, young, left, "one"):
        take(root, disks, name)
    for name in (held, left, "one"):
        os.utime(root / name, (0, 0))
    with vm_snapshot.throwaway(str(root), held):
        vm_snapshot.tidy(str(root))
        assert {one.name for one in root.iterdir()} == {held, young, "one"}
    assert {one.name for one in root.iterdir()} == {young, "one"}
    assert not vm_snapshot.is_throwaway("fork-of-mine")
