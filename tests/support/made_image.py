"""A small image that cannot boot, signed, in a store: for tests of what trusts images."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.host.image_open import Trust
from cloister.host.image_store import ImageStore
from cloister.images.lock import Lock, Package
from cloister.images.manifest import Manifest, Part, Verity
from cloister.images.sbom import spdx
from cloister.images.trust import TrustedKey, signature_line
from cloister.images.verity import BLOCK, build, superblock

SALT = bytes(range(32))
DATA_BLOCKS = 300
"""Three leaves of the tree and a top."""


class Signer:
    """A made-up key."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes(form.Encoding.Raw, form.PublicFormat.Raw).hex()

    def line(self, manifest: Manifest) -> str:
        """The line of manifest.sig."""
        return signature_line(self.public, self._key.sign(manifest.canonical()))

    def trust(self, *names: str, required: bool = True) -> Trust:
        """Trust in this key only."""
        return Trust((TrustedKey(self.public, "the test", names or ("*",)),), required)


def root_image() -> tuple[bytes, Verity]:
    """Data, superblock and tree."""
    data = b"".join(hashlib.sha256(b"%d" % number).digest() * (BLOCK // 32) for number in range(DATA_BLOCKS))
    tree = build((data[at : at + BLOCK] for at in range(0, len(data), BLOCK)), SALT)
    image = data + superblock(DATA_BLOCKS, SALT, tree.root) + tree.blocks
    table = Verity(
        data_blocks=DATA_BLOCKS, hash_start=DATA_BLOCKS + 1, root_hash=tree.root.hex(), salt=SALT.hex(), size=len(image)
    )
    return image, table


def make(
    folder: Path, signers: tuple[Signer, ...], *, name: str = "made", version: int = 1, protocol: int = 1
) -> tuple[ImageStore, Manifest]:
    """Put an image into the store in a folder."""
    store = ImageStore(str(folder))
    kernel, initramfs = b"\x7fELF" + os.urandom(70_000), b"070701" + os.urandom(20_000)
    root, table = root_image()
    lock = Lock(
        name=name,
        suite="bookworm",
        packages=(Package(kind="deb", name="bash", version="5", arch="amd64", sha256="0" * 64),),
    )
    manifest = Manifest(
        name=name, version=version, arch=os.uname().machine, created=1, kernel=_part(kernel), kernel_release="6.1",
        initramfs=_part(initramfs), root=table, cmdline="{verity} {clock}", protocol=protocol, recipe="0" * 64,
        packages=lock.digest(),
    )  # fmt: skip
    with store.making() as work:
        files = {
            "vmlinux": kernel, "initramfs.cpio": initramfs, "root.img": root, "manifest.json": manifest.canonical(),
            "manifest.sig": "".join(signer.line(manifest) for signer in signers).encode(), "lock.json": lock.encoded(),
            "sbom.json": spdx(lock, manifest),
        }  # fmt: skip
        for file, data in files.items():
            Path(work, file).write_bytes(data)
        store.put(work, manifest)
    return store, manifest


def change(path: Path, at: int, *, bit: int = 1) -> None:
    """Flip one bit of a file of a store, as whoever owns it could."""
    path.parent.chmod(0o700)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))
    path.chmod(0o400)


def _part(data: bytes) -> Part:
    return Part(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
