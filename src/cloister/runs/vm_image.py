"""The image of a run: which one its plan names, and its verified descriptors at the start.

A plan is made from the signed manifest alone. What boots is verified again at the start, by the descriptors that the
monitor gets, and must have that same manifest.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from cloister.host.image_open import read_manifest
from cloister.images.manifest import Manifest
from cloister.plan.vm import VmLaunch
from cloister.runs.images import open_for_run, places, store_of, trust_of

if TYPE_CHECKING:
    from cloister.policy.model import Images
    from cloister.runs.paths import Paths

IMAGE = ("kernel", "initramfs", "root")
"""What of a machine's files is its image's, in order."""


class Found(NamedTuple):
    """An image that is trusted, as far as its signature goes."""

    manifest: Manifest
    directory: str


def find(paths: Paths, policy: Images, name: str, uid: int) -> Found:
    """Return the newest version of an image.

    Raises:
        UsageError: `image-missing`.
        DeniedError: it is not trusted.
    """
    where = places(os.environ, paths, policy)
    path = store_of(where, name).path(name)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        manifest, _ = read_manifest(directory, path, name, trust_of(where, policy, uid))
    finally:
        os.close(directory)
    return Found(manifest, path)


def open_verified(paths: Paths, policy: Images, vm: VmLaunch, uid: int) -> tuple[int, int, int]:
    """Open kernel, initramfs and root of what was planned with; the caller closes the descriptors. Takes its time.

    Raises:
        CloisterError: as `image_open.open_image`.
    """
    where = places(os.environ, paths, policy)
    with open_for_run(where, policy, vm.image, uid=uid, manifest=vm.manifest, version=vm.version) as opened:
        return opened.take()


def open_descriptors(paths: Paths, policy: Images, name: str, manifest: str, uid: int) -> tuple[int, int, int]:
    """Do the same for an image and a manifest of which only the names are known.

    Raises:
        CloisterError: as `image_open.open_image`.
    """
    with open_for_run(places(os.environ, paths, policy), policy, name, uid=uid, manifest=manifest) as opened:
        return opened.take()
