"""What a guest gets to hold: the tar of its box and home, on real files, and the console that a monitor leaves."""

import os
import socket
from pathlib import Path

import pytest

from cloister.host.tar_format import entries
from cloister.host.vm_console import keep
from cloister.plan.vm import VmCarried, VmLaunch
from cloister.runs.vm_tar import guest_files

pytestmark = pytest.mark.kernel


def _launch(**changes: object) -> VmLaunch:
    values: dict[str, object] = {
        "image": "i", "version": 1, "manifest": "0", "monitor": "qemu", "accelerator": "tcg", "memory_mib": 1,
        "cpus": 1, "files": (), "fields": (), "inner": (), "directory": "/x", "disk_bytes": 1,
    }  # fmt: skip
    return VmLaunch(**(values | changes))  # type: ignore[arg-type]


def _packed(vm: VmLaunch, box: Path, home: Path) -> dict[str, bytes]:
    """Return the files of the tar, by absolute path."""
    made = guest_files(vm, str(box), str(home))
    try:
        size = os.fstat(made.memory).st_size
        found = entries(lambda offset, length: os.pread(made.memory, length, offset), size)
        files = {f"/{entry.name}": os.pread(made.memory, entry.size, at) for entry, at in found if entry.kind == "file"}
        return {name: data for name, data in files.items() if not name.startswith("/etc/")}  # the time zone
    finally:
        os.close(made.memory)


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A box directory as a run has one: files, a directory, a socket."""
    folder = tmp_path / "box"
    (folder / "identity").mkdir(parents=True)
    (folder / "note.txt").write_text("note")
    (folder / "identity/cloister.jwt").write_text("token")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "egress.sock"))
    return folder


def test_the_box_travels_without_its_sockets(box: Path, tmp_path: Path) -> None:
    """Files of the box and what lies deeper are there; sockets are served, so no entry stands for one."""
    assert _packed(_launch(), box, tmp_path / "home") == {
        "/run/cloister/box/identity/cloister.jwt": b"token",
        "/run/cloister/box/note.txt": b"note",
    }


def test_the_home_gets_copies_and_no_secret(box: Path, tmp_path: Path) -> None:
    """What is carried in is there; a secret inside a carried directory is not, and nothing else of the home."""
    home = tmp_path / "home"
    (home / ".tool").mkdir(parents=True)
    (home / ".tool/settings.json").write_text("{}")
    (home / ".tool/auth.json").write_text("canary")
    (home / ".ssh").mkdir()
    (home / ".ssh/id").write_text("canary")
    vm = _launch(
        carried=(VmCarried(".tool", str(home / ".tool"), "directory"),), secrets=(str(home / ".tool/auth.json"),)
    )
    packed = _packed(vm, box, home)

    assert packed[f"{home}/.tool/settings.json"] == b"{}"
    assert b"canary" not in b"".join(packed.values())


def test_made_files_win_over_carried_ones(box: Path, tmp_path: Path) -> None:
    """Settings of the policy, and a seed, take the place of a carried file of the same name."""
    home = tmp_path / "home"
    (home / ".tool").mkdir(parents=True)
    (home / ".tool/note").write_text("theirs")
    vm = _launch(
        carried=(VmCarried(".tool/note", str(home / ".tool/note"), "file"),), homed=((".tool/note", "note.txt"),),
        seeds=((".tool/seed", "seeded"),),
    )  # fmt: skip
    packed = _packed(vm, box, home)

    assert packed[f"{home}/.tool/note"] == b"note"
    assert packed[f"{home}/.tool/seed"] == b"seeded"


def test_a_console_is_kept_and_a_link_is_not_followed(tmp_path: Path) -> None:
    """Older and newer part are kept in order; a monitor that puts a link there gets nothing of ours copied."""
    directory, secret = tmp_path / "vm", tmp_path / "secret"
    directory.mkdir()
    secret.write_text("canary")
    (directory / "console.log.1").write_text("older ")
    (directory / "console.log").write_text("newer")
    keep(str(directory), str(tmp_path / "kept"))
    (directory / "console.log").unlink()
    (directory / "console.log").symlink_to(secret)
    (directory / "console.log.1").unlink()
    keep(str(directory), str(tmp_path / "stolen"))

    assert (tmp_path / "kept").read_text() == "older newer"
    assert not (tmp_path / "stolen").exists()


def test_a_console_that_blocks_is_no_trap(tmp_path: Path) -> None:
    """A FIFO in its place is passed over, at once."""
    directory = tmp_path / "vm"
    directory.mkdir()
    os.mkfifo(directory / "console.log")
    keep(str(directory), str(tmp_path / "kept"))

    assert not (tmp_path / "kept").exists()
