"""The ELF image inside a compressed kernel: found by the setup header, unpacked by its magic, bounded."""

from __future__ import annotations

import gzip
import lzma
import struct

import pytest

from cloister.errors import UnsupportedError
from cloister.images.kernel import elf_of

ELF = b"\x7fELF" + bytes(range(256)) * 300


def lz4_legacy(data: bytes) -> bytes:
    """Return legacy frames of one block, with the size behind them that the kernel's build appends."""
    from lz4 import block

    packed = block.compress(data, store_size=False)
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(packed)) + packed + struct.pack("<I", len(data))


def zstd(data: bytes) -> bytes:
    """Return a Zstandard frame, with the size behind it."""
    import zstandard

    return zstandard.compress(data) + struct.pack("<I", len(data))


def bzimage(payload: bytes, *, version: int = 0x020F, length: int | None = None) -> bytes:
    """Return a bzImage with this payload (Linux, arch/x86/boot.rst)."""
    head = bytearray(0x300)
    head[0x1F1] = 2
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, 100, len(payload) if length is None else length)
    return bytes(head).ljust(3 * 512, b"\0") + bytes(100) + payload


@pytest.mark.parametrize("pack", [lz4_legacy, zstd, lzma.compress, gzip.compress, bytes])
def test_each_compression_of_the_kernels_build_is_unpacked(pack) -> None:
    """What comes out is what went in, for all ways in which distributions pack kernels."""
    assert elf_of(bzimage(pack(ELF))) == ELF


def test_an_elf_image_is_taken_as_it_is() -> None:
    """A recipe may name a vmlinux."""
    assert elf_of(ELF) == ELF


@pytest.mark.parametrize(
    "data",
    [
        b"", b"MZ" + bytes(2000), bzimage(lz4_legacy(ELF), version=0x0207), bzimage(lz4_legacy(ELF), length=10**6),
        bzimage(lz4_legacy(ELF)[:200]), bzimage(zstd(ELF)[:200]), bzimage(lzma.compress(ELF)[:60]),
        bzimage(gzip.compress(ELF)[:60]), bzimage(b"\x89LZO" + bytes(500)), bzimage(gzip.compress(b"no kernel" * 99)),
        bzimage(b"", length=0),
    ],
)  # fmt: skip
def test_what_is_no_whole_kernel_is_refused(data: bytes) -> None:
    """Other files, old protocols, damaged and unknown payloads end with one clear error."""
    with pytest.raises(UnsupportedError) as caught:
        elf_of(data)
    assert caught.value.reference == "kernel-unusable"
    assert caught.value.remedy
