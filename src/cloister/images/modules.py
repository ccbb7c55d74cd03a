"""Which modules of a kernel a guest needs, and the order in which they load.

Read from the modules themselves: each names in its section `.modinfo` what it depends on (include/linux/module.h), so
a kernel package need not have been installed, and depmod(8) not have run. What is built in is left out. What it is
not: a loader; PID 1 of the guest loads what the initramfs lists.
"""

from __future__ import annotations

import lzma
import struct
from pathlib import Path

from cloister.errors import UnsupportedError
from cloister.images.initramfs import Module

DRIVERS = {
    "virtio_console": 3, "virtio_rng": 4, "virtio_balloon": 5, "virtio_net": 1, "vmw_vsock_virtio_transport": 19,
}  # fmt: skip
"""Drivers that load only where there is such a device, with its type (virtio 1.2, section 5)."""
NEEDED = ("virtio_mmio", "virtio_blk", "dm_verity", "erofs", "overlay", *DRIVERS)
"""By the names the kernel uses. The guest has no others: PID 1 locks the loading of modules before an agent runs."""
OPTIONAL = ("crc32c_intel",)
"""Faster ways to do what is built in; not every processor has them, and not every kernel builds them as modules."""
CARD = ("tcp_diag",)
"""For a guest with a network card, where the kernel has them: they end connections of an address that was another's."""

MAX_MODULE = 64 << 20
_SUFFIXES = (".ko", ".ko.xz")


def needed_modules(tree: Path) -> list[Module]:
    """Return the modules of one kernel in loading order, uncompressed.

    Args:
        tree: its directory of modules, as `/lib/modules/RELEASE`.

    Raises:
        UnsupportedError: `kernel-modules-missing`: it has not what a guest needs; `kernel-module-unusable`: damaged.
        OSError: reading it.
    """
    search = _Search(tree)
    for name in OPTIONAL:
        if name in search.found:
            search.take(name, optional=True)
    for name in NEEDED:
        search.take(name, device=DRIVERS.get(name, 0))
    for name in CARD:
        if name in search.found:
            search.take(name, optional=True, device=DRIVERS["virtio_net"])
    if search.missing:
        raise UnsupportedError(
            "kernel-modules-missing",
            f"the kernel has not what a guest needs: {', '.join(sorted(search.missing))}",
            where=str(tree),
            remedy="use Debian's linux-image-cloud-amd64, or a kernel that has these built in or as modules",
        )
    return search.order


class _Search:
    """One walk through what depends on what."""

    def __init__(self, tree: Path) -> None:
        self.order: list[Module] = []
        self.missing: set[str] = set()
        self._seen: set[str] = set()
        self.found: dict[str, Path] = {}
        for path in sorted(tree.rglob("*.ko*")):
            suffix = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), None)
            if suffix:
                self.found.setdefault(_normal(path.name.removesuffix(suffix)), path)
        self._builtin: set[str] = set()
        listed = tree / "modules.builtin"
        if listed.exists():
            self._builtin = {_normal(Path(line).stem) for line in listed.read_text().splitlines()}

    def take(self, name: str, *, optional: bool = False, device: int = 0) -> None:
        """Take a module, after what it depends on and is not there yet."""
        if name in self._seen or name in self._builtin:
            return
        self._seen.add(name)
        path = self.found.get(name)
        if path is None:
            self.missing.add(name)
            return
        data = _read(path)
        for dependency in _dependencies(data, path):
            self.take(_normal(dependency), optional=optional, device=device)
        self.order.append(Module(f"{name}.ko", data, optional, device))


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        try:
            data = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data, MAX_MODULE + 1)
        except lzma.LZMAError as error:
            raise _unusable(path) from error
    if len(data) > MAX_MODULE:
        raise _unusable(path)
    return data


def _dependencies(data: bytes, path: Path) -> list[str]:
    """Return the `depends` and the soft dependencies (`pre:`) that are modules of this kernel by name."""
    try:
        words = _modinfo(data).split(b"\0")
    except (struct.error, IndexError, ValueError) as error:
        raise _unusable(path) from error
    names: list[str] = []
    for word in words:
        if word.startswith(b"depends="):
            names += [name for name in word[len(b"depends=") :].decode("ascii", "replace").split(",") if name]
    return names


def _modinfo(data: bytes) -> bytes:
    """Return the section `.modinfo` of an ELF object of 64 bits, little endian (elf(5))."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a module")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    names = _section(data, table + size * names_index)
    for index in range(count):
        at = table + size * index
        (name,) = struct.unpack_from("<I", data, at)
        if names[name : names.index(b"\0", name)] == b".modinfo":
            return _section(data, at)
    raise ValueError("it says nothing about itself")


def _section(data: bytes, header: int) -> bytes:
    offset, size = struct.unpack_from("<QQ", data, header + 0x18)
    if offset + size > len(data):
        raise ValueError("it is cut off")
    return data[offset : offset + size]


def _unusable(path: Path) -> UnsupportedError:
    return UnsupportedError(
        "kernel-module-unusable", "a module of the kernel is damaged", where=str(path), remedy="fetch the kernel again"
    )
