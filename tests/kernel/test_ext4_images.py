"""No bytes of an image make the reader of ext4 do anything but read or refuse, and it always comes to an end."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import vm_disk_rig as rig
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.host.ext4 import tree
from cloister.host.ext4.format import BrokenImageError
from cloister.host.ext4.image import Image
from cloister.host.ext4.mapping import spans

pytestmark = pytest.mark.kernel

PLACE = tempfile.TemporaryDirectory(prefix="cloister-ext4.")
FLAVOURS = {
    "modern": ["-t", "ext4", "-b", "1024"],
    "old": ["-t", "ext2", "-b", "1024"],
    "inline": ["-t", "ext4", "-b", "4096", "-O", "inline_data,^has_journal"],
}
BOUND_S = 20.0
"""Far above what the slowest takes (0.3 s); a machine that is busy must not fail this."""
MAX_EXAMPLES = 100


@functools.cache
def image(flavour: str) -> bytes:
    """A sound image with files, directories, links, a file in pieces and a directory of several blocks."""
    source = Path(PLACE.name, "source")
    if not source.exists():
        (source / "a/b/c").mkdir(parents=True)
        (source / "a/file").write_bytes(b"content" * 400)
        (source / "small").write_bytes(b"tiny")
        (source / "link").symlink_to("a/file")
        (source / "long").symlink_to("x/" * 100)
        os.link(source / "small", source / "again")
        with (source / "pieces").open("wb") as file:
            for index in range(40):
                file.seek(index * 8192)
                file.write(b"piece")
        (source / "many").mkdir()
        for index in range(120):
            (source / f"many/a-rather-long-name-{index}").symlink_to("t")
    target = Path(PLACE.name, flavour)
    words = ["mke2fs", "-q", "-F", "-N", "256", *FLAVOURS[flavour], "-d", source, target, "2M"]
    subprocess.run(words, check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
    if flavour == "modern":
        subprocess.run(["e2fsck", "-fyD", target], check=False, env={"PATH": "/usr/sbin:/sbin"}, capture_output=True)
    return target.read_bytes()


def read_all(data: bytes) -> int:
    """Read everything an image says it has; return how many names that was."""
    path = Path(PLACE.name, "mutant")
    path.write_bytes(data)
    count = 0
    with Image(str(path)) as opened:
        for name, inode in tree.walk(opened):
            count += 1
            assert name
            assert not name.startswith(b"/")
            assert b"\0" not in name
            assert not {b"", b".", b".."} & set(name.split(b"/"))
            if inode.is_link:
                assert 0 < len(tree.link(opened, inode)) <= tree.MAX_LINK
            elif inode.is_file:
                for at, part in tree.contents(opened, inode):
                    assert at + len(part) <= inode.size
    return count


@functools.cache
def places(flavour: str) -> tuple[tuple[int, int], ...]:
    """Where structures lie: superblock, group descriptors, inodes in use, and blocks of directories and extents."""
    data = image(flavour)
    path = Path(PLACE.name, "sound")
    path.write_bytes(data)
    found = [(1024, 400)]
    with Image(str(path)) as opened:
        size = opened.super.block_bytes
        found.append(((opened.super.first_data_block + 1) * size, 64))
        found += [(table * size, opened.super.inode_bytes * 40) for table in opened._tables]
        inodes = [opened.inode(2), *(inode for _, inode in tree.walk(opened))]
        for inode in inodes:
            if inode.is_directory:
                found += [(span.physical * size, span.blocks * size) for span in spans(opened, inode)]
    magic = b"\x0a\xf3"
    found += [(at, size) for at in range(0, len(data), size) if data[at : at + 2] == magic]
    return tuple(found)


@st.composite
def mutations(draw: st.DrawFn, flavour: str) -> bytes:
    """An image with a few bytes changed where it hurts."""
    data = bytearray(image(flavour))
    for _ in range(draw(st.integers(1, 6))):
        start, length = draw(st.sampled_from(places(flavour)))
        at = start + draw(st.integers(0, length - 4))
        value = draw(
            st.one_of(
                st.binary(min_size=1, max_size=4),
                st.sampled_from([b"\xff" * 4, bytes(4), b"\x0a\xf3", b"/", b"..", b"\x02\0\0\0", b"\0\0\0\x80"]),
            )
        )
        data[at : at + len(value)] = value
    return bytes(data)


def judge(data: bytes) -> None:
    """Read or refuse, in time."""
    started = time.monotonic()
    try:
        read_all(data)
    except BrokenImageError as error:
        assert error.message.isprintable()  # noqa: PT017  # most mutants are read, some refused
    assert time.monotonic() - started < BOUND_S


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_sound_images_are_read(flavour: str) -> None:
    """The positive twin: what is mutated below is read whole."""
    found = read_all(image(flavour))
    assert found == 131
    target, source = Path(PLACE.name, flavour), Path(PLACE.name, "source")
    assert rig.seen(target) == rig.on_host(source) | {b"lost+found": None}


@given(data=mutations("modern"))
@settings(max_examples=MAX_EXAMPLES, deadline=None)
def test_a_damaged_image_is_read_or_refused(data: bytes) -> None:
    """Extents, an index, 64-bit descriptors, checksums: any change is read or refused, in bounded time."""
    judge(data)


@given(data=mutations("old"))
@settings(max_examples=MAX_EXAMPLES, deadline=None)
def test_a_damaged_old_image_is_read_or_refused(data: bytes) -> None:
    """The same with maps of blocks instead of extents."""
    judge(data)


@given(data=mutations("inline"))
@settings(max_examples=MAX_EXAMPLES, deadline=None)
def test_a_damaged_image_with_inline_data_is_read_or_refused(data: bytes) -> None:
    """The same with files and directories that lie in their inodes."""
    judge(data)


def _hostile() -> Iterator[tuple[str, bytes]]:
    """Images of an attacker who knows the format."""
    data = image("modern")
    tables = [start for start, length in places("modern") if length >= 256 * 40]
    yield "every inode is the same huge directory", _all_inodes(data, tables, 0x41ED)
    yield "every inode is the same huge file", _all_inodes(data, tables, 0x81A4)


def _all_inodes(data: bytes, tables: list[int], mode: int) -> bytes:
    changed = bytearray(data)
    for table in tables:
        for number in range(40):
            at = table + number * 256
            changed[at : at + 2] = mode.to_bytes(2, "little")
            changed[at + 26 : at + 28] = b"\x01\0"
            changed[at + 4 : at + 8] = b"\0\xfc\xff\xff"
            changed[at + 108 : at + 112] = b"\xff\xff\0\0"
    return bytes(changed)


def test_an_attacker_s_images_end() -> None:
    """Sizes of 2^48, and everything pointing at everything: refused or read in time, in little memory."""
    for what, data in _hostile():
        started = time.monotonic()
        with pytest.raises(BrokenImageError):
            read_all(data)
        assert time.monotonic() - started < BOUND_S, what
