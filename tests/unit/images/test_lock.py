"""Locks, lists of contents and the reading back of an initramfs."""

from __future__ import annotations

import json

import pytest

from cloister.images.initramfs import Entry, Module, guest_entries, modules_of, newc, read
from cloister.images.lock import Lock, Package, decode, differences, from_debian, kernel_package
from cloister.images.manifest import Manifest, Part, Verity
from cloister.images.sbom import spdx

RECORDS = """Package: git
Architecture: amd64
Version: 1:2.39
Description: not
 SHA256: 00
SHA256: {}

Package: git
Architecture: amd64
Version: 1:2.40
SHA256: {}
""".format("a" * 64, "b" * 64)
LOCK = Lock(
    name="mine", suite="bookworm", packages=tuple(from_debian("git:amd64=1:2.39", RECORDS)), tools={"mkfs.erofs": "1.5"}
)


def test_packages_get_the_digest_of_their_own_version() -> None:
    """Of two versions that apt knows the installed one counts; without a record nothing is made up."""
    assert LOCK.packages == (Package(kind="deb", name="git", version="1:2.39", arch="amd64", sha256="a" * 64),)
    with pytest.raises(ValueError, match="no digest"):
        from_debian("git:amd64=1:9", RECORDS)
    with pytest.raises(ValueError, match="no digest"):
        kernel_package("")


def test_a_lock_comes_back_as_it_was_written() -> None:
    """Encoding is stable, and nothing else is taken for a lock."""
    assert decode(LOCK.encoded()) == LOCK
    for bad in (b"{}", b"[]", LOCK.encoded().replace(b'"schema": 1', b'"schema": 2'), LOCK.encoded()[:-3]):
        with pytest.raises(ValueError):  # noqa: PT011  # msgspec's
            decode(bad)


def test_every_difference_between_locks_is_named() -> None:
    """Another version, another content of the same version, one more, one less, another tool."""
    one = LOCK.packages[0]
    other = Lock(
        name="mine", suite="bookworm", tools={"mkfs.erofs": "1.8"},
        packages=(Package(kind="deb", name="git", version="1:2.39", arch="amd64", sha256="c" * 64),
                  Package(kind="npm", name="pi", version="1.0.0")),
    )  # fmt: skip
    assert differences(LOCK, LOCK) == []
    assert differences(LOCK, other) == [
        "git 1:2.39, and the lock has another content of the same version", "pi 1.0.0 is missing",
        "mkfs.erofs 1.5, and the lock has 1.8",
    ]  # fmt: skip
    assert differences(other, Lock(name="mine", suite="bookworm", packages=(one,), tools=other.tools)) == [
        "git 1:2.39, and the lock has another content of the same version", "pi 1.0.0 is not in the lock",
    ]  # fmt: skip


def test_the_list_of_contents_names_every_package() -> None:
    """SPDX 2.3 with unique identifiers, package URLs and checksums, the same for the same lock."""
    manifest = Manifest(
        name="mine", version=2, arch="x86_64", created=1735689600, kernel=Part(sha256="0" * 64, size=1),
        kernel_release="6", initramfs=Part(sha256="0" * 64, size=1), cmdline="", protocol=1, recipe="0" * 64,
        packages=LOCK.digest(),
        root=Verity(data_blocks=2, hash_start=3, root_hash="0" * 64, salt="0" * 64, size=1),
    )  # fmt: skip
    document = json.loads(spdx(LOCK, manifest))
    assert (document["spdxVersion"], document["creationInfo"]["created"]) == ("SPDX-2.3", "2025-01-01T00:00:00Z")
    git = next(each for each in document["packages"] if each["name"] == "git")
    assert git["externalRefs"][0]["referenceLocator"] == "pkg:deb/debian/git@1%3A2.39?arch=amd64&distro=bookworm"
    assert git["checksums"] == [{"algorithm": "SHA256", "checksumValue": "a" * 64}]
    names = {each["SPDXID"] for each in document["packages"]}
    assert {each["relatedSpdxElement"] for each in document["relationships"]} == names
    assert spdx(LOCK, manifest) == spdx(LOCK, manifest)


def test_modules_come_back_out_of_an_initramfs() -> None:
    """`image renew` keeps the modules of an image: what went in comes out, in order, optional ones marked."""
    modules = [Module("a.ko", b"12345", optional=True), Module("b.ko", b"")]
    archive = newc(guest_entries(b"program", modules))
    assert modules_of(archive) == modules
    entries = [Entry("dev", 0o755), Entry("dev/null", 0o600, device=(1, 3)), Entry("x", 0o644, data=b"abc")]
    assert read(newc(entries)) == entries
    for bad in (b"", b"07070", archive[:-700], b"x" * 500):
        with pytest.raises(ValueError):  # noqa: PT011
            modules_of(bad)
