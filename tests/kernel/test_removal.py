"""What an agent has made is removed, however it has made it: deep, locked, full of links; and nothing else is."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloister.host import image_store, removal

pytestmark = pytest.mark.kernel


def nested(top: Path, depth: int, name: str) -> None:
    """Make directories within each other, deeper than any path may be long."""
    current = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=current)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=current)
        os.close(current)
        current = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=current))
    os.close(current)


@pytest.mark.parametrize(("depth", "name"), [(3000, "x"), (1200, "y" * 200)], ids=["deep", "longer than a path"])
def test_a_tree_of_any_depth_goes(tmp_path: Path, depth: int, name: str) -> None:
    """`shutil.rmtree` gives up on both, with a RecursionError."""
    top = tmp_path / "top"
    top.mkdir()
    nested(top, depth, name)
    before = len(os.listdir("/proc/self/fd"))
    assert removal.sweep(str(top))
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []


def test_what_was_locked_goes(tmp_path: Path) -> None:
    """Directories that nobody may enter or write, at the top as well."""
    top = tmp_path / "top"
    (top / "a/b/c").mkdir(parents=True)
    (top / "a/b/file").write_text("x")
    for path in (top / "a/b/c", top / "a/b", top / "a", top):
        path.chmod(0)
    assert removal.sweep(str(top))
    assert not top.exists()


def test_links_go_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    """Links to files and to directories, and a link in the place of the whole tree."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").write_text("x")
    kept.chmod(0o500)
    top = tmp_path / "top"
    top.mkdir()
    for name, target in (("file", kept / "precious"), ("directory", kept), ("up", Path("..")), ("none", Path("/none"))):
        (top / name).symlink_to(target)
    os.mkfifo(top / "fifo")
    link = tmp_path / "link"
    link.symlink_to(kept)
    assert removal.sweep(str(top))
    assert removal.sweep(str(link))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "precious").read_text() == "x"
    assert kept.stat().st_mode & 0o777 == 0o500


def test_what_cannot_be_removed_is_told(tmp_path: Path) -> None:
    """`remove` says so with an error, `sweep` by its answer; nothing at all is an error for the one only."""
    assert removal.sweep(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        removal.remove(str(tmp_path / "none"))
    assert not removal.sweep("/proc/self/task")
    with pytest.raises(OSError):  # noqa: PT011  # whichever the kernel has for it
        removal.remove("/proc/self/task")


def test_many_files_take_little_time(tmp_path: Path) -> None:
    """Wide trees cost as much as their files do: no list is read twice."""
    top = tmp_path / "top"
    for directory in range(200):
        (top / str(directory)).mkdir(parents=True)
        for file in range(20):
            (top / str(directory) / str(file)).touch()
    looked = 0
    listdir = os.listdir

    def counted(path: int) -> list[str]:
        nonlocal looked
        looked += 1
        return listdir(path)

    os.listdir = counted  # type: ignore[assignment]
    try:
        assert removal.sweep(str(top))
    finally:
        os.listdir = listdir
    assert looked == 201


def test_two_that_remove_one_tree_leave_nothing(tmp_path: Path) -> None:
    """Two collections of images at once: neither fails because the other was quicker, and nothing stays."""
    for turn in range(5):
        top = tmp_path / str(turn)
        for directory in range(60):
            (top / str(directory) / "a/b").mkdir(parents=True)
            (top / str(directory) / "a/file").touch()
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(image_store.remove_tree, str(top)) for _ in range(2)]:
                done.result(60)
        assert not top.exists()
    assert list(tmp_path.iterdir()) == []
