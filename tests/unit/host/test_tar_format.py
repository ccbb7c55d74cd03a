"""The tar that goes from a user's broker to root's daemon: one way to write it, nothing else is read."""

from __future__ import annotations

import io
import tarfile

import pytest

from cloister.host.tar_format import MAX_BYTES, MAX_ENTRIES, Entry, TarError, encode, end, entries, padding

LONG = "/".join(["a" * 90] * 5)


def tar(*files: tuple[Entry, bytes]) -> bytes:
    """Return a tar of entries with their bytes."""
    return b"".join(encode(entry) + data + padding(len(data)) for entry, data in files) + end()


def read(data: bytes) -> list[tuple[Entry, bytes]]:
    """Return what a tar holds."""
    pairs = entries(lambda at, length: data[at : at + length], len(data))
    return [(entry, data[at : at + entry.size]) for entry, at in pairs]


SOME = [
    (Entry(".pi", "directory"), b""),
    (Entry(".pi/a", "file", 3), b"abc"),
    (Entry(".pi/tool", "file", 512, executable=True), bytes(512)),
    (Entry(f".pi/{LONG}", "file", 1), b"x"),
    (Entry(".pi/\udcff\u00e4", "file"), b""),
]


def test_what_is_written_is_read() -> None:
    """Names, also long and undecodable ones, sizes, contents, the execute bit."""
    assert read(tar(*SOME)) == SOME


def test_tar_itself_reads_it() -> None:
    """It is a tar: others can look at what was carried in."""
    with tarfile.open(fileobj=io.BytesIO(tar(*SOME)), errors="surrogateescape", encoding="utf-8") as archive:
        members = archive.getmembers()
    assert [(one.name, one.isdir(), one.size, one.mode) for one in members] == [
        (entry.name, entry.kind == "directory", entry.size, 0o755 if entry.kind == "directory" or entry.executable
         else 0o644) for entry, _ in SOME]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "a/../b", "a//b", "./a", "a/", "a\0b", "b" * 256, "c/" * 600]
)
def test_a_name_that_leads_elsewhere_is_neither_written_nor_read(name: str) -> None:
    """Absolute, `..`, empty parts, NUL, too long."""
    with pytest.raises(TarError):
        encode(Entry(name, "file"))
    raw = bytearray(encode(Entry("x" * min(len(name), 99) or "x", "file")))
    raw[:100] = name.encode()[:100].ljust(100, b"\0")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    if len(name) <= 100:
        with pytest.raises(TarError):
            read(bytes(raw) + end())


KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.XHDTYPE)


@pytest.mark.parametrize("kind", [*KINDS, tarfile.CONTTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_devices_and_extensions_are_refused(kind: bytes) -> None:
    """Attack: what tar(1) would follow, make or obey. A plain file by the same hand is refused too: it has a time."""
    for of in (kind, tarfile.REGTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.linkname, info.mtime = of, "/etc/shadow" if of == kind else "", 1
        with pytest.raises(TarError):
            read(info.tobuf(tarfile.USTAR_FORMAT) + end())


def test_what_is_cut_off_or_goes_on_is_refused() -> None:
    """A tar is read whole or not at all: no end, half an entry, something behind its end."""
    good = tar(*SOME)
    for cut in range(0, len(good), 512):
        with pytest.raises(TarError):
            read(good[:cut])
    for bad in (good + bytes(512), good[:-1], good + good):
        with pytest.raises(TarError):
            read(bad)


def test_bounds_hold_before_anything_is_read() -> None:
    """Attack: a header that promises a terabyte, and more entries than the bound."""
    huge = encode(Entry("x", "file", MAX_BYTES + 1)) + end()
    with pytest.raises(TarError, match="more than"):
        read(huge)
    one = encode(Entry("x", "file"))
    with pytest.raises(TarError, match="more than"):
        read(one * (MAX_ENTRIES + 1) + end())
    assert len(read(one * 3 + end())) == 3
