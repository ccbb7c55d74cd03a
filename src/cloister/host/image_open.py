"""Open a guest image for a virtual machine: what was verified is what the monitor gets, by descriptor.

Kernel and initramfs are copied into sealed memory (memfd_create(2)) and hashed there: nobody, not even
whoever owns the files, can change them between the check and the boot. The root is too large for that; the guest's
kernel checks each of its blocks against the signed tree, so its descriptor may show anything at all. Copies are kept
for the next run, as long as the files they came from look untouched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Self

import msgspec

from cloister.errors import DeniedError
from cloister.host import image_store
from cloister.host.image_store import ImageStore, SeenVersions
from cloister.images import trust
from cloister.images.manifest import Manifest, Part
from cloister.images.trust import TrustedKey

_KEPT = 4
"""Sealed copies that are kept: those of two images."""
_PIECE = 1 << 20


class Trust(NamedTuple):
    """Whose images count."""

    keys: Sequence[TrustedKey]
    required: bool = True
    """Whether an image without a trusted signature is refused."""


class OpenedImage:
    """A verified image; close it when the monitor has its descriptors."""

    def __init__(
        self, path: str, manifest: Manifest, signer: TrustedKey | None, descriptors: tuple[int, int, int]
    ) -> None:
        """Take over the descriptors."""
        self.path = path
        """Its directory, for messages: what boots is what the descriptors hold."""
        self.manifest = manifest
        self.signer = signer
        """Who has signed it; None where no signature is asked for and there is none that counts."""
        self.kernel, self.initramfs, self.root = descriptors
        """Readable, close-on-exec; kernel and initramfs are sealed, each at offset 0."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the descriptors that were not taken (set to -1 by whoever took one)."""
        for descriptor in (self.kernel, self.initramfs, self.root):
            if descriptor >= 0:
                os.close(descriptor)
        self.kernel = self.initramfs = self.root = -1

    def take(self) -> tuple[int, int, int]:
        """Return the descriptors of kernel, initramfs and root; the caller closes them from now on."""
        taken = (self.kernel, self.initramfs, self.root)
        self.kernel = self.initramfs = self.root = -1
        return taken


def open_image(  # noqa: PLR0913  # each decides by itself
    store: ImageStore, name: str, trusted: Trust, *, version: int | None = None, seen: SeenVersions | None = None,
    manifest: str = "",
) -> OpenedImage:  # fmt: skip
    """Verify an image and open it.

    Args:
        store: where it lies.
        name: its name.
        trusted: whose signature counts.
        version: which one; the newest if none is given.
        seen: versions used before, which it must not be older than; this one is remembered. None asks nobody.
        manifest: the digest that its manifest must have, from a plan; empty for any.

    Raises:
        UsageError: `image-missing`.
        DeniedError: `image-unsigned`, `image-key-unknown`, `image-key-name`, `image-signature-bad`, `image-manifest`,
            `image-changed` (kernel, initramfs or root is not what was signed), `image-older`.
        StepError: `image-seen`: the record of used versions is damaged.
    """
    path = store.path(name, version)
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise changed(path, error.strerror or "it cannot be opened") from error
    try:
        found, signer = read_manifest(directory, path, name, trusted)
        if manifest and found.digest() != manifest:
            raise changed(path, "it is not the image that was planned with")
        public = signer.public if signer else ""
        if seen is not None:
            trust.check_not_older(name, found.version, seen.highest(name, public))
        with contextlib.ExitStack() as stack:
            descriptors: list[int] = []
            for file, part in ((image_store.KERNEL, found.kernel), (image_store.INITRAMFS, found.initramfs)):
                descriptors.append(_sealed(directory, f"{path}/{file}", part))
                stack.callback(os.close, descriptors[-1])
            descriptors.append(_open_root(directory, f"{path}/{image_store.ROOT}", found))
            stack.callback(os.close, descriptors[-1])
            if seen is not None:
                seen.note(name, public, found.version)
            stack.pop_all()
        return OpenedImage(path, found, signer, (descriptors[0], descriptors[1], descriptors[2]))
    finally:
        os.close(directory)


def read_manifest(directory: int, path: str, name: str, trusted: Trust) -> tuple[Manifest, TrustedKey | None]:
    """Return the manifest in an opened directory, and who signed it.

    Raises:
        DeniedError: it is not trusted, or not that of an image of this name and place.
    """
    data = _small(directory, f"{path}/{image_store.MANIFEST}")
    try:
        signatures = trust.parse_signatures(_small(directory, f"{path}/{image_store.SIGNATURE}"))
        signer = trust.judge(data, signatures, trusted.keys, name)
    except DeniedError as error:
        # Without `require_signature` an image may have none, or one of a stranger; a wrong one is never passed over.
        if trusted.required or error.reference == "image-signature-bad":
            error.where = error.where or path
            raise
        signer = None
    manifest = decode_manifest(data, path)
    if manifest.name != name or str(manifest.version) != os.path.basename(path):
        raise changed(path, f"its manifest is that of {manifest.name} {manifest.version}")
    if manifest.arch != os.uname().machine:
        raise DeniedError("image-arch", f"the image is for {manifest.arch}", where=path)
    return manifest, signer


def decode_manifest(data: bytes, path: str) -> Manifest:
    """Return the manifest of a file: exactly its canonical form, so that what is read is what was signed.

    Raises:
        DeniedError: `image-manifest`.
    """
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise DeniedError("image-manifest", f"the manifest cannot be read: {error}", where=path) from None
    if manifest.canonical() != data:
        raise DeniedError("image-manifest", "the manifest is not in its canonical form", where=path)
    return manifest


def changed(path: str, why: str) -> DeniedError:
    """Return the refusal of an image that is not what was signed."""
    return DeniedError("image-changed", f"the image is not what was signed: {why}", where=path,
                       remedy="build or fetch the image again; this one was changed")  # fmt: skip


# --- sealed copies, kept for the next run ---------------------------------------------------------------

_copies: OrderedDict[tuple[int, ...], tuple[str, int]] = OrderedDict()
"""By identity of the file: the digest of the copy, and its descriptor."""
_lock = threading.Lock()


def _sealed(directory: int, path: str, part: Part) -> int:
    """Return a new descriptor of the sealed copy of a file that has the digest it must have."""
    source = _open(directory, path)
    try:
        info = os.fstat(source)
        if not stat.S_ISREG(info.st_mode) or info.st_size != part.size:
            raise changed(path, f"it has {info.st_size} bytes instead of {part.size}")
        key = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        with _lock:
            kept = _copies.get(key)
            if kept is None or kept[0] != part.sha256:
                kept = _copy(source, path, part)
                _keep(key, kept)
            _copies.move_to_end(key)
            # A description of its own, so that nobody's offset is anybody else's, and for reading only.
            return os.open(f"/proc/self/fd/{kept[1]}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(source)


def _copy(source: int, path: str, part: Part) -> tuple[str, int]:
    copy = os.memfd_create("cloister-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = part.size
        while left and (count := os.sendfile(copy, source, None, left)):
            left -= count
        fcntl.fcntl(
            copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )
        _check_digest(copy, path, part)
    except BaseException:
        os.close(copy)
        raise
    return part.sha256, copy


def _check_digest(copy: int, path: str, part: Part) -> None:
    digest, at = hashlib.sha256(), 0
    while piece := os.pread(copy, _PIECE, at):
        digest.update(piece)
        at += len(piece)
    if digest.hexdigest() != part.sha256:
        raise changed(path, "its content is another")


def _keep(key: tuple[int, ...], copy: tuple[str, int]) -> None:
    old = _copies.pop(key, None)
    if old:
        os.close(old[1])
    while len(_copies) >= _KEPT:
        os.close(_copies.popitem(last=False)[1][1])
    _copies[key] = copy


def forget() -> None:
    """Let go of all copies: 55 MB of memory for each image."""
    with _lock:
        while _copies:
            os.close(_copies.popitem()[1][1])


def _open_root(directory: int, path: str, manifest: Manifest) -> int:
    descriptor = _open(directory, path)
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or info.st_size != manifest.root.size:
        os.close(descriptor)
        raise changed(path, f"it has {info.st_size} bytes instead of {manifest.root.size}")
    return descriptor


def _open(directory: int, path: str) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(os.path.basename(path), flags, dir_fd=directory)
    except OSError as error:
        raise changed(path, error.strerror or "it cannot be opened") from error


def _small(directory: int, path: str) -> bytes:
    descriptor = _open(directory, path)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise changed(path, "it is no plain file")
        return os.read(descriptor, trust.MAX_BYTES)
    finally:
        os.close(descriptor)
