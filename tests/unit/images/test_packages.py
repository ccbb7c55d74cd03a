"""An archive of one's own: what apt is told about it, and what of a lock comes from it."""

from __future__ import annotations

import hashlib

from cloister.images import packages
from cloister.images.lock import Lock, Package

LOCK = Lock(
    name="mine", suite="trixie",
    packages=(
        Package(kind="deb", name="git", version="1:2.39", arch="amd64", sha256="a" * 64),
        Package(kind="deb", name="base-files", version="13", arch="amd64", sha256="b" * 64),
        Package(kind="kernel", name="linux-image-6.12-cloud-amd64", version="6.12-1", arch="amd64", sha256="c" * 64),
        Package(kind="npm", name="pi", version="1.0.0", sha256="sha512-x"),
        Package(kind="pip", name="httpie", version="3", sha256="d" * 64),
    ),
)  # fmt: skip


def test_only_debians_packages_come_from_it() -> None:
    """Those of npm and PyPI have archives that forget nothing; the kernel is one of Debian's."""
    assert sorted(packages.of_debian(LOCK.packages)) == ["a" * 64, "b" * 64, "c" * 64]
    assert packages.kernel_of(LOCK) == "linux-image-6.12-cloud-amd64"
    assert not packages.kernel_of(Lock(name="mine", suite="trixie", packages=LOCK.packages[:2]))


def test_what_apt_is_told() -> None:
    """Each version above all others, its suite, and the digest of its index."""
    index = b"Package: git\n\n"
    assert packages.preferences(LOCK).decode().split("\n\n")[:2] == [
        "Package: base-files\nPin: version 13\nPin-Priority: 1001",
        "Package: git\nPin: version 1:2.39\nPin-Priority: 1001",
    ]
    told = packages.release("trixie", index).decode().splitlines()
    assert "Suite: trixie" in told
    assert f" {hashlib.sha256(index).hexdigest()} {len(index)} Packages" in told
    assert packages.source("/x") == "deb [trusted=yes] copy:/x ./"
