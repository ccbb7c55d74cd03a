"""The image of a run: which one the plan names, and its verified descriptors at the start."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from cloister.errors import StepError, UsageError
from cloister.images.manifest import Manifest
from cloister.plan.vm import VmFile, VmLaunch

if TYPE_CHECKING:
    from cloister.runs.paths import Paths

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Found(NamedTuple):
    """An image in a store."""

    manifest: Manifest
    directory: str


def find(paths: Paths, name: str) -> Found:
    """Return the newest version of an image."""
    for store in stores(paths):
        try:
            versions = sorted(int(word) for word in os.listdir(f"{store}/{name}") if word.isdigit())
        except OSError:
            continue
        if versions:
            directory = f"{store}/{name}/{versions[-1]}"
            with open(f"{directory}/manifest.json", "rb") as file:
                return Found(msgspec.json.decode(file.read(), type=Manifest), directory)
    raise UsageError("image-missing", f"there is no guest image {name}", remedy=f"cloister image build {name}")


def stores(paths: Paths) -> tuple[str, ...]:
    """Return where images lie."""
    data = os.environ.get("XDG_DATA_HOME", "")
    return (
        f"{data if data.startswith('/') else paths.home + '/.local/share'}/cloister/images",
        "/var/lib/cloister/images",
    )


def open_verified(paths: Paths, vm: VmLaunch) -> tuple[int, ...]:
    """Open kernel, initramfs and root, and see by these descriptors that they are what was signed.

    Raises:
        StepError: `image-changed`.
    """
    del paths
    opened: list[int] = []
    try:
        for file in vm.files:
            if file.write:
                continue
            descriptor = os.open(file.path, _READ)
            opened.append(descriptor)
            _check(file, descriptor)
    except BaseException:
        for descriptor in opened:
            os.close(descriptor)
        raise
    return tuple(opened)


def _check(file: VmFile, descriptor: int) -> None:
    if file.digest and _digest(descriptor) != file.digest:
        raise StepError("image-changed", f"the image's {file.role} is not what was signed", where=file.path)


def _digest(descriptor: int) -> str:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    os.lseek(descriptor, 0, os.SEEK_SET)
    return digest
