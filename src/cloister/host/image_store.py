"""The store of guest images: `NAME/VERSION/` directories that appear whole and are never changed.

A version is made beside the store's names and renamed into place, its files 0400 in a directory 0500. Nothing here
judges whether an image may be used (`image_open`): the store is only where they lie. The highest version that was used
of each image and signer is kept outside of it (`SeenVersions`), where replacing images does not reach.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import os
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

import msgspec

from cloister.errors import StepError, UsageError
from cloister.host import private_files, removal
from cloister.images.manifest import Manifest

KERNEL, INITRAMFS, ROOT = "vmlinux", "initramfs.cpio", "root.img"
MANIFEST, SIGNATURE, LOCK, SBOM = "manifest.json", "manifest.sig", "lock.json", "sbom.json"
FILES = (KERNEL, INITRAMFS, ROOT, MANIFEST, SIGNATURE, LOCK, SBOM)
FILE_MODE = 0o400
MAX_SMALL = 8 << 20
"""Bytes of a file of the store that is read whole, other than kernel and initramfs."""
_MAKING = ".making-"


class Stored(NamedTuple):
    """One version in the store."""

    name: str
    version: int
    path: str
    bytes: int
    """What it takes on the disk."""


class ImageStore:
    """A directory of images."""

    def __init__(self, directory: str) -> None:
        """Name it; it is made by the first image."""
        self.directory = directory

    def names(self) -> list[str]:
        """Return the names of images."""
        try:
            found = os.listdir(self.directory)
        except OSError:
            return []
        return sorted(name for name in found if not name.startswith(".") and self.versions(name))

    def versions(self, name: str) -> list[int]:
        """Return the versions of an image, the oldest first."""
        try:
            found = os.listdir(f"{self.directory}/{name}")
        except OSError:
            return []
        return sorted(int(word) for word in found if word.isascii() and word.isdigit() and not word.startswith("0"))

    def path(self, name: str, version: int | None = None) -> str:
        """Return the directory of a version, the newest one if none is given.

        Raises:
            UsageError: `image-missing`.
        """
        versions = self.versions(name) if "/" not in name and not name.startswith(".") else []
        if not versions or (version is not None and version not in versions):
            shown = f"{name} {version}" if version is not None and versions else name
            raise UsageError("image-missing", f"there is no guest image {shown}", where=self.directory,
                             remedy=self._remedy(name))  # fmt: skip
        return f"{self.directory}/{name}/{versions[-1] if version is None else version}"

    def _remedy(self, name: str) -> str:
        """Return what gives an image of this name: one that is there, or a build from a recipe that comes along."""
        if close := difflib.get_close_matches(name, [one for one in self.names() if one != name], n=1):
            return f"did you mean {close[0]}?"
        if (resources.files("cloister.images") / "recipes" / f"{name}.toml").is_file():
            return f"cloister image build {name}"
        return f"cloister image list; or cloister image build ./{name}.toml, from a recipe of yours"

    def stored(self) -> Iterator[Stored]:
        """Yield every version."""
        for name in self.names():
            for version in self.versions(name):
                path = f"{self.directory}/{name}/{version}"
                yield Stored(name, version, path, _size(path))

    @contextlib.contextmanager
    def making(self) -> Iterator[str]:
        """Make a directory for a new version, beside the names; what is left of it at the end is removed.

        What killed makers left goes first: each holds a lock on its directory while it lives.

        Raises:
            OSError: it cannot be made.
        """
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        self.clean()
        path = f"{self.directory}/{_MAKING}{os.urandom(8).hex()}"
        os.mkdir(path, 0o700)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield path
        finally:
            remove_tree(path)  # before the lock goes: nobody else takes it for a leftover meanwhile
            os.close(handle)

    def clean(self) -> list[str]:
        """Remove what makers left that were killed; return the paths."""
        gone: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.directory):
                path = f"{self.directory}/{name}"
                if name.startswith(_MAKING) and remove_abandoned(path):
                    gone.append(path)
        return gone

    def put(self, made: str, manifest: Manifest) -> str:
        """Take what was made in a directory of `making` as a version; return its path. It is on disk afterwards.

        Raises:
            StepError: `image-version-exists`.
            OSError: it cannot be written.
        """
        target = f"{self.directory}/{manifest.name}/{manifest.version}"
        for name in FILES:
            path = f"{made}/{name}"
            if name == SIGNATURE and not os.path.exists(path):
                open(path, "wb").close()
            os.chmod(path, FILE_MODE)
            _sync(path)
        fresh = f"{made}/whole"
        os.mkdir(fresh, 0o700)
        for name in FILES:
            os.rename(f"{made}/{name}", f"{fresh}/{name}")
        os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
        _sync(fresh)
        self._rename(fresh, target)
        os.chmod(target, 0o500)
        _sync(os.path.dirname(target))
        return target

    def _rename(self, fresh: str, target: str) -> None:
        name, version = target.split("/")[-2:]
        with private_files.locked(os.path.dirname(target)):
            self.refuse_existing(name, int(version))
            os.rename(fresh, target)

    def refuse_existing(self, name: str, version: int) -> None:
        """Refuse to make what there is already.

        Raises:
            StepError: `image-version-exists`.
        """
        path = f"{self.directory}/{name}/{version}"
        if os.path.lexists(path):
            message = f"there is a version {version} of the image {name} already"
            raise StepError("image-version-exists", message, where=path, remedy="leave --version out")

    def replace_signatures(self, path: str, data: bytes) -> None:
        """Put other signatures beside a manifest."""
        os.chmod(path, 0o700)
        try:
            private_files.replace(f"{path}/{SIGNATURE}", data)
            os.chmod(f"{path}/{SIGNATURE}", FILE_MODE)
        finally:
            os.chmod(path, 0o500)

    def remove(self, name: str, version: int) -> None:
        """Take a version out: it vanishes as a whole before its files go."""
        path = self.path(name, version)
        away = f"{self.directory}/{_MAKING}gone-{os.urandom(8).hex()}"
        os.chmod(path, 0o700)
        os.rename(path, away)
        remove_tree(away)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(path))


class SeenVersions:
    """The highest version used of each image and signer: a file of this user's."""

    def __init__(self, path: str) -> None:
        """Use a file; it is made with the first version."""
        self.path = path

    def highest(self, name: str, public: str) -> int:
        """Return it, 0 for an image never used.

        Raises:
            StepError: `image-seen`: the file is not readable, so that nobody knows whether this goes back.
        """
        return self._read().get(f"{name} {public}", 0)

    def note(self, name: str, public: str, version: int, *, lower: bool = False) -> None:
        """Remember a version; a lower one only by a person's word.

        Raises:
            StepError: `image-seen`.
            OSError: it cannot be written.
        """
        key = f"{name} {public}"
        if self._read().get(key, 0) >= version and not lower:
            return
        with private_files.locked(os.path.dirname(self.path)):
            seen = self._read()
            if seen.get(key, 0) < version or lower:
                private_files.replace(self.path, msgspec.json.encode(seen | {key: version}, order="sorted"))

    def _read(self) -> dict[str, int]:
        if not os.path.lexists(self.path):
            return {}
        data = private_files.read(self.path)
        try:
            return msgspec.json.decode(data or b"", type=dict[str, int])
        except msgspec.DecodeError as error:
            remedy = "look at it; remove it only if you know that no image was put back"
            message = "the record of used versions of images cannot be read"
            raise StepError("image-seen", message, where=self.path, remedy=remedy) from error


def remove_tree(path: str) -> None:
    """Remove a directory of ours, in which scripts of packages may have written anything. Others may do the same.

    Raises:
        OSError: something could not be removed.
    """
    while os.path.lexists(path):
        try:
            removal.remove(path)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTEMPTY}:  # what two that remove find of each other
                raise


def remove_abandoned(path: str) -> bool:
    """Remove a directory whose lock nobody holds; say whether it was one."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_tree(path)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _size(path: str) -> int:
    total = 0
    for name in FILES:
        with contextlib.suppress(OSError):
            total += os.stat(f"{path}/{name}").st_blocks * 512
    return total


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
