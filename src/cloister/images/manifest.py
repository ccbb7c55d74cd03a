"""The signed manifest of a guest image: everything that decides what boots.

What is signed is the canonical JSON of a `Manifest` (keys sorted, no spaces), with Ed25519 (RFC 8032). It covers the
kernel, the initramfs, the template of the command line and the whole verity table, so that no superblock on a disk is
ever believed. `version` counts upwards; a store refuses to go back.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9._-]{0,62}$")]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of the image that is read whole: its digest and its size in bytes."""

    sha256: Sha256
    size: Annotated[int, msgspec.Meta(gt=0)]


class Verity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The root's whole dm-verity table (Documentation/admin-guide/device-mapper/verity.rst), blocks of 4,096 bytes."""

    data_blocks: Annotated[int, msgspec.Meta(gt=0)]
    hash_start: Annotated[int, msgspec.Meta(gt=0)]
    """The block at which the tree begins: behind the superblock that veritysetup(8) writes, which nobody reads."""
    root_hash: Sha256
    salt: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, msgspec.Meta(gt=0)]
    """Of data and tree, in bytes."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One version of one image."""

    schema: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    name: Name
    version: Annotated[int, msgspec.Meta(gt=0)]
    arch: str
    """As uname(2) says it."""
    created: int
    """SOURCE_DATE_EPOCH of the build, in seconds."""
    kernel: Part
    kernel_release: str
    initramfs: Part
    root: Verity
    cmdline: str
    """Template of the kernel's command line; `{verity}` and `{clock}` are filled in by the launcher."""
    protocol: Annotated[int, msgspec.Meta(gt=0)]
    """Which version of the channel's protocol the guest speaks."""
    recipe: Sha256
    """Digest of the recipe that it was built from."""
    packages: Sha256
    """Digest of its list of packages (the lock)."""

    def canonical(self) -> bytes:
        """Return the bytes that are signed."""
        return msgspec.json.encode(self, order="sorted")

    def digest(self) -> str:
        """Return the SHA-256 of the canonical form, in hex."""
        return hashlib.sha256(self.canonical()).hexdigest()
