"""What programs of a build have made is taken as it is, or not at all: no link leads whoever builds anywhere."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.errors import StepError
from cloister.host import image_build, image_made, image_store
from cloister.host.image_build import Order, build
from cloister.host.image_jail import Say, run
from cloister.host.image_packages import KeptPackages
from cloister.host.image_place import Place, build_place
from cloister.host.image_root import Sources
from cloister.images import recipe as recipes
from cloister.images.lock import Package
from cloister.images.recipe import Recipe

pytestmark = pytest.mark.kernel
RESULTS = ("root.img", "vmlinux", "initramfs.cpio", "manifest.json", "manifest.sig", "lock.json", "sbom.json")
OTHERS = ("debs", "kernel", "customize", "files.tar", "preferences", "archive", "kernel.deb", "package.json", "wheels")
# As a script of a package does that has left the tree: links under all names that whoever builds could use.
HOSTILE = """
set -eu
victim=$1
shift
for name; do
    rm -rf "$name"
    ln -s "$victim" "$name"
    ln -s "$victim" "../$name" || true
    ! ln -s "$victim" "../given/$name"
done
for name in given root index unpacked; do ln -sfn "$victim" "../$name" || true; done
"""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Where the results go."""
    (tmp_path / "made").mkdir(mode=0o700)
    return tmp_path / "made"


@pytest.fixture
def place(made: Path) -> Iterator[Place]:
    """Where a build works."""
    with build_place(str(made)) as found:
        yield found


@pytest.mark.parametrize("spoil", ["link", "directory", "fifo", "missing", "through", "folder"])
def test_only_plain_files_are_read(tmp_path: Path, spoil: str) -> None:
    """A link at the end or on the way, a directory, a FIFO that nobody writes: refused at once, nothing is copied."""
    work = tmp_path / "work"
    (work / "kernel").mkdir(parents=True)
    (work / "kernel/one.deb").write_bytes(b"right")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/one.deb").write_bytes(b"secret")
    directory, name = str(work), "kernel/one.deb"
    assert image_made.content(directory, name, 5) == b"right"
    assert image_made.digest(directory, name) == hashlib.sha256(b"right").hexdigest()
    with pytest.raises(StepError, match="longer than"):
        image_made.content(directory, name, 4)
    os.unlink(work / name)
    match spoil:
        case "link":
            (work / name).symlink_to(tmp_path / "secret/one.deb")
        case "directory":
            (work / name).mkdir()
        case "fifo":
            os.mkfifo(work / name)
        case "through":
            (work / "kernel").rmdir()
            (work / "kernel").symlink_to(tmp_path / "secret")
        case "folder":
            (tmp_path / "other").symlink_to(tmp_path / "secret")
            directory, name = str(tmp_path / "other"), "one.deb"
    for attempt in (image_made.digest, lambda *words: image_made.content(*words, 9)):
        with pytest.raises(StepError) as caught:
            attempt(directory, name)
        assert caught.value.reference == "image-build"
    with pytest.raises(StepError):
        image_made.copy(directory, name, str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()
    assert spoil in {"link", "directory", "fifo"} or not image_made.names(directory, "kernel")


def test_what_scripts_of_packages_leave_leads_nowhere(
    tmp_path: Path, made: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They own the tree. Links for the rest of the build change no file of the user; the image is what was built."""
    victim = tmp_path / "authorized_keys"
    victim.write_text("mine")
    _without_archives(monkeypatch, str(victim))
    recipe = recipes.load('schema = 1\nname = "small"\n', "small.toml")
    shim = tmp_path / "shim"
    shim.write_bytes(b"program")
    kept = KeptPackages(f"{tmp_path}/.packages")
    manifest = build(Order(1, str(shim), recipe, kept=kept), place, str(made), Sources(()), lambda _: None)
    assert victim.read_text() == "mine"
    for name, part in ((image_store.KERNEL, manifest.kernel), (image_store.INITRAMFS, manifest.initramfs)):
        assert not (made / name).is_symlink()
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == part.sha256
    assert (made / image_store.ROOT).stat().st_size == manifest.root.size
    assert b"mine" not in b"".join(path.read_bytes() for path in made.iterdir() if path.is_file())
    # What stood in the lock before they ran is what stands there.
    assert b"essential" in (made / image_store.LOCK).read_bytes()


@pytest.mark.root
def test_what_they_leave_leads_root_nowhere(
    tmp_path: Path, made: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for root's builds, whose programs are another user's: no file of root's is changed or copied."""
    assert place.uid is not None
    test_what_scripts_of_packages_leave_leads_nowhere(tmp_path, made, place, monkeypatch)
    assert {os.lstat(path).st_uid for path in made.iterdir()} == {0}


def _without_archives(monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    """Let a build have one package of Debian's and a kernel of four bytes; then a hostile script runs in its jail."""

    def make_tree(_: Recipe, place: Place, __: Sources, ___: Say) -> None:
        digest = "a" * 64
        script = f"""
        mkdir -p tree/etc tree/root debs kernel && echo root >tree/etc/passwd
        head -c 100000 /dev/urandom >tree/etc/more
        echo essential:all=1 >packages
        printf 'Package: essential\\nArchitecture: all\\nVersion: 1\\nSHA256: {digest}\\n' >records
        printf 'kernel' >kernel/k.deb
        printf 'Package: linux\\nArchitecture: all\\nVersion: 1\\nSHA256: %s\\n' \
            "$(sha256sum <kernel/k.deb | cut -c -64)" >kernel-record
        """
        run(["sh", "-euc", script], place.work, network=False)

    def add_agents(_: Recipe, place: Place, *__: object) -> list[Package]:
        names = [*RESULTS, *OTHERS, "packages", "records", "kernel-record"]
        run(["sh", "-c", HOSTILE, "sh", victim, *names], place.work, network=False, read=[place.given])
        return []

    monkeypatch.setattr(image_build, "make_tree", make_tree)
    monkeypatch.setattr(image_build, "add_agents", add_agents)
    monkeypatch.setattr(image_build, "_kernel", lambda *_: ("6.1", b"elf!", Path("/nowhere")))
    monkeypatch.setattr(image_build, "needed_modules", lambda _: [])
    monkeypatch.setattr(image_build, "elf_of", lambda data: data)
