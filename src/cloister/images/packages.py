"""An archive of one's own, as apt reads it: how packages that Debian no longer has come back for a lock. Pure.

Such an archive is one directory: `DIGEST.deb` for each package, `Packages` with what is in them (deb822(5)), and
`Release`, by which apt and mmdebstrap know its suite. Nobody signs it: what lies there was held against the lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cloister.images.lock import Lock, Package

INDEX = "Packages"
RELEASE = "Release"
_OF_DEBIAN = ("deb", "kernel")
_ABOVE_ALL = 1001
"""A priority above 1000 counts also where another source has a newer version: apt_preferences(5)."""


def of_debian(packages: Iterable[Package]) -> dict[str, Package]:
    """Return those that come from Debian's archive, by the SHA-256 of their files."""
    return {each.sha256: each for each in packages if each.kind in _OF_DEBIAN}


def kernel_of(lock: Lock) -> str:
    """Return the name of the kernel's package; nothing for an image with another kernel."""
    return next((each.name for each in lock.packages if each.kind == "kernel"), "")


def source(directory: str) -> str:
    """Return the line of sources.list(5) for an archive in a directory."""
    return f"deb [trusted=yes] copy:{directory} ./"


def release(suite: str, index: bytes) -> bytes:
    """Return the archive's `Release` for the bytes of its index."""
    digest = hashlib.sha256(index).hexdigest()
    lines = ("Origin: Cloister", f"Suite: {suite}", f"Codename: {suite}", "SHA256:", f" {digest} {len(index)} {INDEX}")
    return "".join(f"{line}\n" for line in lines).encode()


def preferences(lock: Lock) -> bytes:
    """Return what makes apt take the lock's versions wherever it finds them (apt_preferences(5))."""
    chosen = sorted({(each.name, each.version) for each in of_debian(lock.packages).values()})
    return "".join(
        f"Package: {name}\nPin: version {version}\nPin-Priority: {_ABOVE_ALL}\n\n" for name, version in chosen
    ).encode()
