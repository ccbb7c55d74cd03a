"""Images of somebody who knows the format: changed by structure, built to cost. All end, soon, and in little memory."""

from __future__ import annotations

import functools
import resource
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ext4_images import FLAVOURS, PLACE, image, judge, places

from cloister.host.ext4 import tree
from cloister.host.ext4.format import BrokenImageError
from cloister.host.ext4.image import Image
from cloister.host.ext4.mapping import spans

pytestmark = pytest.mark.kernel

BOUND_S = 30.0
"""Of processor time; the slowest takes a tenth of it."""
GROWTH_KIB = 256 << 10
EXTENTS, INLINE, INDEX, ENCRYPTED = 0x80000, 0x10000000, 0x1000, 0x800
NUMBERS = st.one_of(
    st.integers(0, 40), st.sampled_from([0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]),
    st.integers(0, 0xFFFFFFFF),
)  # fmt: skip

# Field: where in its structure, how wide, and what to put there besides any number.
INODE = (
    (0, "H", (0x41ED, 0x81A4, 0xA1FF, 0x11A4, 0, 0xFFFF)), (4, "I", (0, 1, 59, 60, 61, 4096, 1 << 20)),
    (26, "H", (0, 1, 2, 65000)), (32, "I", (0, EXTENTS, INLINE, EXTENTS | INDEX, EXTENTS | INLINE, ENCRYPTED)),
    (40, "H", (0xF30A, 0)), (42, "H", (0, 1, 4, 5, 340)), (46, "H", (0, 1, 5, 6)), (52, "I", (0, 1, 1 << 31)),
    (56, "H", (0, 1, 0x8000, 0x8001)), (56, "I", ()), (58, "H", (0, 1)), (60, "I", ()), (64, "I", ()), (88, "I", ()),
    (92, "I", ()), (96, "I", ()), (100, "I", (0, 1)), (108, "I", (0, 1, 0xFFFF)), (128, "H", (0, 4, 28, 32, 124, 128)),
    (160, "I", (0xEA020000, 0)), (164, "B", (0, 4, 255)), (165, "B", (7, 1)), (166, "H", (0, 4, 90, 0xFFFF)),
    (168, "I", (0, 1)), (172, "I", (0, 1, 90, 200)),
)  # fmt: skip
ENTRY = ((0, "I", (0, 1, 2, 3, 11)), (4, "H", (0, 4, 8, 12, 16, 1024, 4096, 0xFFFC)), (6, "B", (0, 1, 2, 255)),
         (7, "B", (1, 2, 7, 0xDE)), (8, "B", (0, 0x2E, 0x2F)), (9, "B", (0, 0x2E, 0x2F)))  # fmt: skip
NODE = (
    (0, "H", (0xF30A, 0)),
    (2, "H", (0, 1, 84, 340, 0xFFFF)),
    (4, "H", ()),
    (6, "H", (0, 1, 2, 5, 6)),
    *((12 + 12 * n + at, kind, ()) for n in (0, 1, 5) for at, kind in ((0, "I"), (4, "H"), (4, "I"), (8, "I"))),
)
SUPER = (
    (0, "I", (11, 12, 1 << 20)), (4, "I", (1, 8, 1 << 31)), (20, "I", (0, 1)), (24, "I", (0, 1, 2, 6, 7)),
    (32, "I", (0, 1, 8, 8192, 65536)), (40, "I", (0, 1, 8, 8192)), (58, "H", (0, 1, 2)), (76, "I", (0, 1)),
    (88, "H", (64, 128, 256, 257, 1024, 4096)), (92, "I", ()), (96, "I", (0x2C2, 0x242, 0x2, 0x82C2)), (100, "I", ()),
    (232, "I", (0, 12)), (254, "H", (0, 31, 32, 64)), (336, "I", (0, 1)),
)  # fmt: skip
GROUP = ((0, "I", ()), (4, "I", ()), (8, "I", (0, 1, 2)), (40, "I", (0, 1)))


@functools.cache
def structures(flavour: str) -> dict[str, tuple[tuple[int, tuple[tuple[int, str, tuple[int, ...]], ...]], ...]]:
    """Where each structure of a sound image is, with its fields."""
    data = image(flavour)
    super_at, groups, *_ = (start for start, _ in places(flavour))
    path = Path(PLACE.name, "sound")
    path.write_bytes(data)
    inodes, entries, nodes = [], [], []
    with Image(str(path)) as opened:
        found, size = opened.super, opened.super.block_bytes
        for inode in (opened.inode(2), *(inode for _, inode in tree.walk(opened))):
            group, index = divmod(inode.number - 1, found.inodes_per_group)
            inodes.append((opened._tables[group] * size + index * found.inode_bytes, INODE))
            if inode.is_directory:
                for span in spans(opened, inode):
                    for block in range(span.physical, span.physical + span.blocks):
                        entries += [(at, ENTRY) for at in _slots(data, block * size, size)]
    nodes = [(at, NODE) for at in range(0, len(data), size) if data[at : at + 2] == b"\x0a\xf3"]
    kinds = {"super": [(super_at, SUPER)], "group": [(groups, GROUP)], "inode": inodes, "entry": entries, "node": nodes}
    return {kind: tuple(dict.fromkeys(where)) for kind, where in kinds.items() if where}


def _slots(data: bytes, start: int, size: int) -> Iterator[int]:
    """Yield where entries of a block of a directory begin."""
    at = start
    while at < start + size:
        yield at
        length = struct.unpack_from("<H", data, at + 4)[0]
        if length < 8:
            return
        at += length


class Change(NamedTuple):
    """What one place of an image says instead."""

    at: int
    says: bytes
    moved: int = -1
    """Where the bytes are from, if they are another structure's: 128 of them."""


@st.composite
def changes(draw: st.DrawFn, flavour: str) -> list[Change]:
    """Fields that say something else, or one structure where another was. Not the image: all that is drawn is kept."""
    found = structures(flavour)
    drawn = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["inode", "inode", "entry", "entry", "node", "super", "group"]))
        at, fields = draw(st.sampled_from(found.get(kind, found["inode"])))
        if kind in {"inode", "node"} and draw(st.integers(0, 5)) == 0:
            other, _ = draw(st.sampled_from(found.get(kind, found["inode"])))
            drawn.append(Change(at, b"", other))
            continue
        place, width, likely = draw(st.sampled_from(fields))
        value = draw(st.one_of(st.sampled_from(likely), NUMBERS) if likely else NUMBERS)
        bits = struct.calcsize(width) * 8
        drawn.append(Change(at + place, struct.pack(f"<{width}", value & ((1 << bits) - 1))))
    return drawn


def changed(flavour: str, drawn: list[Change]) -> bytes:
    """Return the image with these changes, one after the other."""
    data = bytearray(image(flavour))
    for at, says, moved in drawn:
        if moved >= 0:
            data[at : at + 128] = data[moved : moved + 128]
        else:
            data[at : at + len(says)] = says
    return bytes(data)


@pytest.mark.parametrize("examples", [40, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_any_field_may_say_anything(flavour: str, examples: int) -> None:
    """Extents, indexes, inline data, attributes, maps of blocks, names: read or refused, whatever a field says."""

    @given(drawn=changes(flavour))
    @settings(max_examples=examples, deadline=None)
    def one(drawn: list[Change]) -> None:
        judge(changed(flavour, drawn))

    one()


class Large:
    """A sparse image of 8 GiB, as a guest has it, whose inodes and free blocks can be written by hand."""

    BLOCK = 4096

    def __init__(self, place: Path, *options: str) -> None:
        self.path = place / "large.img"
        with self.path.open("wb") as file:
            file.truncate(8 << 30)
        source = place / "source"
        (source / "victim").mkdir(parents=True)
        (source / "file").write_bytes(b"x")
        words = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-N", "4096", "-O", "^metadata_csum,^has_journal"]
        subprocess.run([*words, *options, "-d", source, self.path], check=True, env={"PATH": "/usr/sbin:/sbin"})
        self.file = self.path.open("r+b")
        with Image(str(self.path)) as opened:
            self._tables, self._per_group = opened._tables, opened.super.inodes_per_group
            self._bytes = opened.super.inode_bytes
            self.numbers = {path: inode.number for path, inode in tree.walk(opened)}
        self.free = 1_115_000
        """A block that nobody has, far from those that mke2fs takes."""

    def put(self, data: bytes) -> int:
        """Write a new block; return its number."""
        self.file.seek(self.free * self.BLOCK)
        self.file.write(data.ljust(self.BLOCK, b"\0"))
        self.free += 1
        return self.free - 1

    def inode(self, name: bytes, at: int, data: bytes) -> None:
        """Write into an inode."""
        group, index = divmod(self.numbers[name] - 1, self._per_group)
        self.file.seek(self._tables[group] * self.BLOCK + index * self._bytes + at)
        self.file.write(data)

    def map(self, name: bytes, size: int, root: bytes, flags: int) -> None:
        """Give an inode a size and the root of a map."""
        self.inode(name, 4, struct.pack("<I", size & 0xFFFFFFFF))
        self.inode(name, 108, struct.pack("<I", size >> 32))
        self.inode(name, 32, struct.pack("<I", flags))
        self.inode(name, 40, root.ljust(60, b"\0"))


def header(entries: int, depth: int) -> bytes:
    """The head of a node of extents."""
    return struct.pack("<HHHHI", 0xF30A, entries, 340, depth, 0)


def index(logical: int, block: int) -> bytes:
    """An entry that leads to a node."""
    return struct.pack("<IIHH", logical, block, 0, 0)


def extent(logical: int, block: int, length: int = 1) -> bytes:
    """An entry that leads to blocks."""
    return struct.pack("<IHHI", logical, length, 0, block)


def a_directory_of_nothing(large: Large) -> None:
    """A hundred thousand blocks of a directory, which are one block, with 341 unused entries."""
    nothing = large.put(
        b"".join(struct.pack("<IHBB4x", 0, 12, 0, 0) for _ in range(340)) + struct.pack("<IHBB8x", 0, 16, 0, 0)
    )
    nodes = []
    for first in range(0, 340 * 340, 340):
        leaf = header(340, 0) + b"".join(extent(first + n, nothing) for n in range(340))
        nodes.append(index(first, large.put(leaf)))
    root = index(0, large.put(header(340, 1) + b"".join(nodes)))
    large.map(b"victim", 340 * 340 * 4096, header(1, 2) + root, EXTENTS)


def a_map_of_maps(large: Large) -> None:
    """Three levels of pointers, each level one block that is named a thousand times."""
    empty = large.put(b"")
    third = large.put(struct.pack("<I", empty) * 1024)
    second = large.put(struct.pack("<I", third) * 1024)
    large.map(b"file", 4 << 40, struct.pack("<15I", *[0] * 14, second), 0)


def many_empty_maps(large: Large) -> None:
    """A hundred thousand blocks of pointers, none of which leads anywhere: holes of the image itself."""
    second = [large.put(struct.pack("<1024I", *range(base, base + 1024))) for base in range(1_200_000, 1_300_000, 1024)]
    third = large.put(struct.pack(f"<{len(second)}I", *second))
    large.map(b"file", 4 << 40, struct.pack("<15I", *[0] * 14, third), 0)


def a_tree_of_itself(large: Large) -> None:
    """Nodes that lie on the right level, and are all the same."""
    node = large.put(header(1, 0) + extent(0, 5))
    for depth in range(1, 5):
        node = large.put(header(340, depth) + b"".join(index(n, node) for n in range(340)))
    large.map(b"file", 1 << 40, header(4, 5) + b"".join(index(n, node) for n in range(4)), EXTENTS)


def a_node_of_two(large: Large) -> None:
    """One node in the maps of two inodes."""
    node = large.put(header(1, 0) + extent(0, large.put(struct.pack("<IHBB", 0, 4096, 0, 0))))
    for name in (b"victim", b"file"):
        large.map(name, 4096, header(1, 1) + index(0, node), EXTENTS)


ATTACKS = (a_directory_of_nothing, a_map_of_maps, many_empty_maps, a_tree_of_itself, a_node_of_two)
READ = {many_empty_maps}
"""Costs what it is long, and is a file with holes."""


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_what_is_built_to_cost_is_refused(tmp_path: Path, attack: object) -> None:
    """A small image that says it is endless costs neither minutes nor memory, on a disk of 8 GiB."""
    assert callable(attack)
    large = Large(tmp_path)
    attack(large)
    large.file.close()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()

    def read() -> None:
        with Image(str(large.path)) as opened:
            for _, inode in tree.walk(opened):
                if inode.is_file:
                    for _ in tree.contents(opened, inode):
                        pass

    if attack in READ:
        read()
    else:
        with pytest.raises(BrokenImageError):
            read()
    assert time.process_time() - began < BOUND_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KIB


def test_inodes_are_no_larger_than_anybody_makes_them(tmp_path: Path) -> None:
    """64 KiB of attributes in each inode would be read for every name: such a file system is refused."""
    large = Large(tmp_path)
    large.file.seek(1024 + 24)
    large.file.write(struct.pack("<I", 6))
    large.file.seek(1024 + 88)
    large.file.write(struct.pack("<H", 0x8000))
    large.file.close()
    with pytest.raises(BrokenImageError, match="contradicts"):
        Image(str(large.path))
