"""Which modules a guest gets: what it needs, after what that needs, nothing that is built in."""

from __future__ import annotations

import lzma
import struct
from pathlib import Path

import pytest

from cloister.errors import UnsupportedError
from cloister.images.modules import CARD, NEEDED, OPTIONAL, needed_modules


def module(depends: str) -> bytes:
    """Return an ELF object with a section .modinfo and nothing else."""
    info = f"license=GPL\0depends={depends}\0".encode()
    names = b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(info) + len(names)
    head = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    )
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, 64, len(info), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, 64 + len(info), len(names), 0, 0, 1, 0)
    return head + info + names + sections


def tree(folder: Path, **depends: str) -> Path:
    """Make a directory of modules: all that are needed, with these dependencies."""
    made = dict.fromkeys((*NEEDED, *OPTIONAL), "") | depends
    (folder / "kernel/drivers").mkdir(parents=True)
    for name, needs in made.items():
        (folder / f"kernel/drivers/{name}.ko").write_bytes(module(needs))
    return folder


def test_dependencies_come_first_and_once(tmp_path: Path) -> None:
    """A module stands behind all that it depends on, however deep, and dashes are underscores."""
    found = tree(tmp_path, virtio_blk="virtio,virtio-ring", virtio_mmio="virtio", virtio="virtio_ring", virtio_ring="")
    names = [each.name for each in needed_modules(found)]
    assert names.index("virtio_ring.ko") < names.index("virtio.ko") < names.index("virtio_mmio.ko")
    assert len(names) == len(set(names))
    assert {f"{name}.ko" for name in NEEDED} <= set(names)


def test_what_only_some_processors_have_may_be_refused(tmp_path: Path) -> None:
    """Modules for special instructions are marked, the others must load."""
    for each in needed_modules(tree(tmp_path)):
        assert each.optional == (each.name.removesuffix(".ko") in OPTIONAL)


def test_drivers_load_only_for_their_devices(tmp_path: Path) -> None:
    """What only a driver needs has its condition; what others need as well, and what the root needs, has none."""
    found = tree(tmp_path, virtio_net="virtio,net_failover", net_failover="", virtio_mmio="virtio", virtio="")
    devices = {each.name: each.device for each in needed_modules(found)}
    assert devices["virtio_net.ko"] == devices["net_failover.ko"] == 1
    assert devices["virtio.ko"] == devices["virtio_blk.ko"] == devices["erofs.ko"] == 0


def test_what_only_a_card_wants_may_be_missing(tmp_path: Path) -> None:
    """What ends a card's connections comes behind its driver, for a card only, and a kernel without it does as well."""
    assert f"{CARD[0]}.ko" not in {each.name for each in needed_modules(tree(tmp_path / "without"))}
    order = needed_modules(tree(tmp_path / "with", tcp_diag="inet_diag", inet_diag=""))
    names = [each.name for each in order]
    assert names.index("virtio_net.ko") < names.index("inet_diag.ko") < names.index("tcp_diag.ko")
    assert {(each.optional, each.device) for each in order[-2:]} == {(True, 1)}


def test_what_is_built_in_is_left_out(tmp_path: Path) -> None:
    """A kernel that has something built in needs no module for it."""
    found = tree(tmp_path)
    (found / "kernel/drivers/erofs.ko").unlink()
    (found / "modules.builtin").write_text("kernel/fs/erofs/erofs.ko\n")
    assert "erofs.ko" not in [each.name for each in needed_modules(found)]


def test_compressed_modules_are_unpacked(tmp_path: Path) -> None:
    """Newer kernels of Debian have .ko.xz: the guest gets them unpacked, since PID 1 unpacks nothing."""
    found = tree(tmp_path)
    plain = found / "kernel/drivers/erofs.ko"
    data = plain.read_bytes()
    plain.unlink()
    plain.with_suffix(".ko.xz").write_bytes(lzma.compress(data))
    assert next(each for each in needed_modules(found) if each.name == "erofs.ko").data == data


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    """A kernel that cannot carry a guest is refused with everything that it lacks."""
    found = tree(tmp_path)
    for name in ("erofs", "dm_verity"):
        (found / f"kernel/drivers/{name}.ko").unlink()
    with pytest.raises(UnsupportedError, match="dm_verity, erofs"):
        needed_modules(found)


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + bytes(60), module("")[:200]])
def test_a_damaged_module_is_refused(tmp_path: Path, data: bytes) -> None:
    """A module that cannot be read is named, and nothing is built with it."""
    found = tree(tmp_path)
    (found / "kernel/drivers/erofs.ko").write_bytes(data)
    with pytest.raises(UnsupportedError) as caught:
        needed_modules(found)
    assert caught.value.reference == "kernel-module-unusable"
