"""Packages that are kept for a lock: named by what they hold, never lent changed, and gone with the last lock."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.errors import StepError
from cloister.host.image_jail import run
from cloister.host.image_packages import KeptPackages, lent
from cloister.host.image_place import Place, build_place
from cloister.host.image_root import Sources
from cloister.images import packages
from cloister.images.lock import Lock, Package

pytestmark = pytest.mark.kernel
LONG_AGO = 1_000_000


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A place of a build, whose programs have fetched something."""
    (tmp_path / "made").mkdir()
    with build_place(str(tmp_path / "made")) as found:
        for name in ("debs", "kernel"):
            Path(found.work, name).mkdir()
        yield found


@pytest.fixture
def work(place: Place) -> Path:
    """Where its programs work."""
    return Path(place.work)


def deb(folder: Path, name: str, version: str, *, size: int = 3) -> Package:
    """Make a package in a folder, and return what a lock says of it."""
    tree = folder / f"{name}.tree"
    (tree / "DEBIAN").mkdir(parents=True)
    fields = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: x\nDescription: y\n more\n"
    (tree / "DEBIAN/control").write_text(fields)
    (tree / "file").write_bytes(b"x" * size)
    path = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, path], check=True, capture_output=True)
    subprocess.run(["rm", "-r", tree], check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package(kind="deb", name=name, version=version, arch="all", sha256=digest)


def lock_of(*found: Package) -> Lock:
    """Return a lock."""
    return Lock(name="mine", suite="trixie", packages=tuple(sorted(found)))


def test_what_a_build_has_used_is_kept_and_lent(tmp_path: Path, work: Path) -> None:
    """By its digest, readable by nobody else; what the lock does not name, and what is a link, is not taken."""
    one, two = deb(work / "debs", "one", "1:1.0"), deb(work / "kernel", "two", "2")
    stranger = deb(work / "debs", "stranger", "1")
    elsewhere = deb(tmp_path, "linked", "1")
    (work / "debs/linked.deb").symlink_to(next(tmp_path.glob("linked*.deb")))
    kept = KeptPackages(f"{tmp_path}/store/.packages")
    kept.keep([one, two, elsewhere], str(work))
    place = Path(kept.directory)
    assert {each.name for each in place.iterdir()} == {f"{one.sha256}.deb", f"{two.sha256}.deb"}
    assert {stat.S_IMODE(each.stat().st_mode) for each in place.iterdir()} == {0o400}
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert kept.count(lock_of(one, two, stranger)) == (2, 3)
    (tmp_path / "lent").mkdir()
    assert kept.lend(lock_of(one, two, stranger), str(tmp_path / "lent")) == [stranger]
    for package in (one, two):
        copy = (tmp_path / "lent" / f"{package.sha256}.deb").read_bytes()
        assert hashlib.sha256(copy).hexdigest() == package.sha256


@pytest.mark.parametrize("spoil", ["changed", "cut", "another", "link"])
def test_one_that_is_not_what_it_was_is_never_lent(tmp_path: Path, work: Path, spoil: str) -> None:
    """A byte, the end, the whole file, a link to another: it counts as not kept; the one beside it is lent."""
    one, two = deb(work / "debs", "one", "1"), deb(work / "debs", "two", "2", size=5000)
    kept = KeptPackages(f"{tmp_path}/.packages")
    kept.keep([one, two], str(work))
    path = Path(kept.directory, f"{one.sha256}.deb")
    right = path.read_bytes()
    path.chmod(0o600)
    match spoil:
        case "changed":
            path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        case "cut":
            path.write_bytes(right[:-1])
        case "another":
            path.write_bytes(Path(kept.directory, f"{two.sha256}.deb").read_bytes())
        case "link":
            path.rename(tmp_path / "right.deb")
            path.symlink_to(tmp_path / "right.deb")
    (tmp_path / "lent").mkdir()
    assert kept.lend(lock_of(one, two), str(tmp_path / "lent")) == [one]
    assert os.listdir(tmp_path / "lent") == [f"{two.sha256}.deb"]
    assert os.listdir(kept.directory) == [f"{two.sha256}.deb"]
    kept.keep([one, two], str(work))  # the next build keeps it again
    assert path.read_bytes() == right


def test_they_go_with_the_last_lock_that_names_them(tmp_path: Path, work: Path) -> None:
    """Not while a lock names one, nor just after a build; half of one, which a killed build left, goes at once."""
    one, two, three = (deb(work / "debs", name, "1") for name in ("one", "two", "three"))
    kept = KeptPackages(f"{tmp_path}/.packages")
    assert kept.collect([], dry_run=False) == []
    kept.keep([one, two, three], str(work))
    place = Path(kept.directory)
    (place / ".new").write_bytes(b"half")
    for package in (one, two):
        os.utime(place / f"{package.sha256}.deb", (LONG_AGO, LONG_AGO))
    unused = str(place / f"{two.sha256}.deb")
    assert kept.collect([lock_of(one)], dry_run=True) == [unused]
    assert len(os.listdir(place)) == 4
    assert kept.collect([lock_of(one)], dry_run=False) == [unused]
    assert sorted(os.listdir(place)) == sorted(f"{each.sha256}.deb" for each in (one, three))
    (place / ".new").write_bytes(b"half")
    kept.keep([one, two, three], str(work))
    assert len(os.listdir(place)) == 3


def test_apt_takes_the_locks_versions(tmp_path: Path, place: Place, work: Path) -> None:
    """One version from what is kept, another from the archive; newer ones there count for nothing."""
    archive = Path(place.given, "debian")
    archive.mkdir()
    one, two = deb(work / "debs", "one", "1"), deb(archive, "two", "1")
    deb(archive, "one", "2")
    deb(archive, "two", "2")
    index = b"".join(
        subprocess.run(["dpkg-deb", "--field", path], check=True, capture_output=True).stdout
        + f"Filename: ./{path.name}\nSize: {path.stat().st_size}\n".encode()
        + f"SHA256: {hashlib.sha256(path.read_bytes()).hexdigest()}\n\n".encode()
        for path in sorted(archive.glob("*.deb"))
    )
    (archive / "Packages").write_bytes(index)
    (archive / "Release").write_bytes(packages.release("trixie", index))
    kept = KeptPackages(f"{tmp_path}/.packages")
    kept.keep([one], str(work))
    heard: list[str] = []
    found = lent(kept, lock_of(one, two), place, Sources((packages.source(str(archive)),)), heard.append)
    assert heard == ["1 of the lock's packages are kept here, 1 are to be fetched"]
    assert found.network
    uris = apt(place, found)
    assert f"copy:{place.given}/archive/./{one.sha256}.deb" in uris
    assert f"copy:{archive}/./two_1_all.deb" in uris
    assert "_2_all" not in uris
    # All are kept: no other archive counts, and no network is there.
    for path in (f"{place.given}/archive", f"{place.base}/index"):
        subprocess.run(["rm", "-r", path], check=True)
    found = lent(kept, lock_of(one), place, Sources((packages.source(str(archive)),)), heard.append)
    assert (found.network, found.lines) == (False, (packages.source(f"{place.given}/archive"),))


def apt(place: Place, found: Sources) -> str:
    """Return what apt would fetch for both packages."""
    top = Path(place.fresh("apt"))
    for name in (
        "etc/apt/preferences.d",
        "var/lib/apt/lists/partial",
        "var/cache/apt/archives/partial",
        "var/lib/dpkg",
    ):
        (top / name).mkdir(parents=True)
    (top / "etc/apt/sources.list").write_text("".join(f"{line}\n" for line in found.lines))
    (top / "etc/apt/preferences.d/lock").write_bytes(Path(found.preferences).read_bytes())
    (top / "var/lib/dpkg/status").touch()
    if place.uid is not None:
        subprocess.run(["chown", "-R", f"{place.uid}:{place.uid}", top], check=True)
    options = f"-o Dir={top} -o Dir::State::status={top}/var/lib/dpkg/status -o APT::Sandbox::User=root"
    script = f"apt-get {options} -qq update && apt-get {options} -qq --print-uris install one two"
    return run(["sh", "-c", script], str(top), network=False, read=[place.given])


def test_what_is_no_package_ends_the_build(tmp_path: Path, place: Place, work: Path) -> None:
    """A file whose digest is right and that dpkg cannot read: refused with dpkg's words."""
    (work / "debs/odd.deb").write_bytes(b"no package, whoever reads it")
    digest = hashlib.sha256(b"no package, whoever reads it").hexdigest()
    odd = lock_of(Package(kind="deb", name="odd", version="1", arch="all", sha256=digest))
    kept = KeptPackages(f"{tmp_path}/.packages")
    kept.keep(odd.packages, str(work))
    with pytest.raises(StepError, match="dpkg-deb: error"):
        lent(kept, odd, place, Sources(()), lambda _: None)
