"""Take the ELF image out of a compressed x86 kernel: monitors start it faster, and Firecracker takes nothing else.

The setup header of a bzImage says where its payload lies (Linux, arch/x86/boot.rst, "payload_offset"); the payload's
magic says how it is compressed. Debian uses LZ4's legacy frames (6.1) and Zstandard (6.12). Pure and bounded.
What it is not: a judge of the kernel; the manifest's signature is.
"""

from __future__ import annotations

import lzma
import struct
import zlib

from cloister.errors import UnsupportedError

MAX_KERNEL = 512 << 20
"""Bytes of an unpacked kernel; Debian's cloud kernel has 52 MiB."""

_ELF = b"\x7fELF"
_SETUP_SECTS, _HEADER_MAGIC, _VERSION, _PAYLOAD = 0x1F1, 0x202, 0x206, 0x248
_SECTOR = 512
_VERSION_WITH_PAYLOAD = 0x0208
_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 << 20
_TRAILING = 4
"""The kernel's build appends the unpacked size to what it has compressed (scripts/Makefile.lib, size_append)."""


def elf_of(data: bytes) -> bytes:
    """Return the ELF image of a kernel: of a bzImage, or the bytes themselves when they are one.

    Raises:
        UnsupportedError: `kernel-unusable`: neither, of a compression we do not know, or damaged.
    """
    if data.startswith(_ELF):
        return data
    payload = _payload(data)
    try:
        kernel = _unpack(payload)
    except (ValueError, RuntimeError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise _unusable(f"its payload is damaged: {error}") from error
    if not kernel.startswith(_ELF):
        raise _unusable("what it holds is not an ELF image")
    return kernel


def _payload(data: bytes) -> bytes:
    if len(data) < _PAYLOAD + 8 or data[_HEADER_MAGIC : _HEADER_MAGIC + 4] != b"HdrS":
        raise _unusable("it is neither an ELF image nor a bzImage")
    (version,) = struct.unpack_from("<H", data, _VERSION)
    if version < _VERSION_WITH_PAYLOAD:
        raise _unusable("its boot protocol is older than 2.08, and does not say where its payload is")
    offset, length = struct.unpack_from("<II", data, _PAYLOAD)
    start = ((data[_SETUP_SECTS] or 4) + 1) * _SECTOR + offset
    if length == 0 or start + length > len(data):
        raise _unusable("it is cut off")
    return data[start : start + length]


def _unpack(payload: bytes) -> bytes:
    if payload.startswith(_LZ4_LEGACY):
        return _lz4(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd(payload)
    if payload.startswith(b"\xfd7zXZ\0"):
        xz = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        return _whole(xz.decompress(payload, MAX_KERNEL), ended=xz.eof)
    if payload.startswith(b"\x1f\x8b"):
        gzip = zlib.decompressobj(wbits=31)
        return _whole(gzip.decompress(payload, MAX_KERNEL), ended=gzip.eof)
    if payload.startswith(_ELF):
        return payload
    raise _unusable(f"its compression is unknown (it begins with {payload[:4].hex()})")


def _lz4(payload: bytes) -> bytes:
    from lz4 import block

    parts: list[bytes] = []
    total, at, end = 0, len(_LZ4_LEGACY), len(payload) - _TRAILING
    while at + 4 <= end:
        (size,) = struct.unpack_from("<I", payload, at)
        at += 4
        if size == 0 or at + size > len(payload):
            raise ValueError("a block is cut off")
        parts.append(block.decompress(payload[at : at + size], uncompressed_size=_LZ4_BLOCK))
        total += len(parts[-1])
        if total > MAX_KERNEL:
            raise ValueError("it is too large")
        at += size
    return b"".join(parts)


def _zstd(payload: bytes) -> bytes:
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(write_size=1 << 20)
    try:
        return _whole(unpacker.decompress(payload), ended=unpacker.eof)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _whole(kernel: bytes, *, ended: bool) -> bytes:
    if not ended or len(kernel) > MAX_KERNEL:
        raise ValueError("it is cut off, or too large")
    return kernel


def _unusable(why: str) -> UnsupportedError:
    return UnsupportedError(
        "kernel-unusable",
        f"the kernel cannot be used: {why}",
        remedy="name a kernel of Debian (linux-image-cloud-amd64), or an ELF vmlinux, in the recipe",
    )
