"""A copy of a workspace, in the form of an overlay's upper directory: same content, and only what a review takes."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from cloister.errors import UnsupportedError
from cloister.host import workspace_copy
from cloister.host.idmap_support import has_idmapped_mounts
from cloister.host.overlay_review import open_review
from cloister.host.workspace_copy import copy_workspace

pytestmark = pytest.mark.kernel


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A workspace with all kinds of things, and an empty directory."""
    root, upper = tmp_path / "root", tmp_path / "upper"
    for made in (root / "sub/deep", upper):
        made.mkdir(parents=True)
    (root / "file").write_text("content\n")
    (root / "file").chmod(0o4750)
    (root / "sub/deep/link").symlink_to("/etc/passwd")
    with (root / "sparse").open("wb") as file:
        file.seek(1 << 24)
        file.write(b"end")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(root / "socket"))
    os.utime(root / "file", ns=(1, 2_000_000_000))
    return root, upper


def test_a_copy_is_no_change(places: tuple[Path, Path]) -> None:
    """Reviewed against the workspace, a fresh copy differs only where something was left out; times are kept."""
    root, upper = places
    copy_workspace(str(root), str(upper))
    with open_review(str(root), str(upper), names=(), since_ns=0) as review:
        found = {change.path: change.op for change in review.changes()}
    assert found == {"file": "modified", "pipe": "deleted", "socket": "deleted"}, "its set-id bit is not copied"
    assert stat.S_IMODE((upper / "file").stat().st_mode) == 0o750
    assert (upper / "file").stat().st_mtime_ns == 2_000_000_000
    assert (upper / "sub/deep/link").readlink() == Path("/etc/passwd")
    assert (upper / "sparse").stat().st_blocks * 512 < 1 << 22


def test_what_is_deleted_in_a_copy_is_found(places: tuple[Path, Path]) -> None:
    """The copy hides what lies below it, so a name that is gone from it is a deletion."""
    root, upper = places
    copy_workspace(str(root), str(upper))
    (upper / "sub/deep/link").unlink()
    with open_review(str(root), str(upper), names=(), since_ns=0) as review:
        assert ("sub/deep/link", "deleted") in [(change.path, change.op) for change in review.changes()]


def test_too_much_is_refused(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """More entries than are copied, and a disk without room for them, are refusals that name the workspace."""
    root, upper = places
    monkeypatch.setattr(workspace_copy, "MAX_ENTRIES", 3)
    with pytest.raises(UnsupportedError, match="more than 3 entries") as caught:
        copy_workspace(str(root), str(upper))
    assert caught.value.where == str(root)
    monkeypatch.undo()
    monkeypatch.setattr(workspace_copy, "SPARE_BYTES", 1 << 62)
    (upper / "again").mkdir()
    with pytest.raises(UnsupportedError, match="No space left"):
        copy_workspace(str(root), str(upper / "again"))


@pytest.mark.parametrize("which", [0, 1])
def test_a_link_in_place_of_a_directory_is_not_followed(places: tuple[Path, Path], which: int) -> None:
    """Neither workspace nor target may be reached through a link."""
    link = places[0].parent / "link"
    link.symlink_to(places[which])
    words = [str(place) for place in places]
    words[which] = str(link)
    with pytest.raises(UnsupportedError):
        copy_workspace(*words)


def test_file_systems_that_cannot_map_ids_are_known() -> None:
    """The file system of /proc maps no ids on any kernel; that a directory is gone is an error, not an answer."""
    opened = os.open("/proc", os.O_PATH)
    assert not has_idmapped_mounts(opened)
    os.close(opened)
    with pytest.raises(OSError, match="Bad file descriptor"):
        has_idmapped_mounts(opened)
