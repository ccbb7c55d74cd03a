"""The store of images and the keys that count: whole or not at all, and believed only where nobody else could write."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.errors import DeniedError, StepError, UsageError
from cloister.host import image_keys
from cloister.host.image_open import open_image
from cloister.host.image_store import ImageStore, SeenVersions
from cloister.images.trust import key_line
from cloister.policy.model import Images
from cloister.runs.images import ImagePlaces, collect_images, look, sign_image, trust_of
from cloister.runs.store import Store
from support.made_image import Signer, change, make

pytestmark = pytest.mark.kernel
ME = frozenset({os.getuid()})


def places(folder: Path) -> ImagePlaces:
    """Places of a user below a folder, and no system's."""
    return ImagePlaces(
        store=f"{folder}/images", key=f"{folder}/key/image-key.pem", trust=f"{folder}/trust.d",
        seen=f"{folder}/seen.json",
        system_store=f"{folder}/system", system_trust=f"{folder}/system-trust",
    )  # fmt: skip


def test_a_version_is_immutable_and_its_files_are_private(tmp_path: Path) -> None:
    """Files are 0400 in a directory 0500, and a version that is there is never replaced."""
    store, _ = make(tmp_path / "images", ())
    path = Path(store.path("made"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o500
    assert {stat.S_IMODE(each.stat().st_mode) for each in path.iterdir()} == {0o400}
    before = (path / "vmlinux").read_bytes()
    with pytest.raises(StepError) as caught:
        make(tmp_path / "images", ())
    assert caught.value.reference == "image-version-exists"
    assert (path / "vmlinux").read_bytes() == before
    make(tmp_path / "images", (), version=2)
    assert store.versions("made") == [1, 2]
    assert store.path("made").endswith("/2")


@pytest.mark.parametrize("name", ["../images/made", ".", "..", "", "made/1", "/etc", ".making-x"])
def test_names_never_lead_out_of_the_store(tmp_path: Path, name: str) -> None:
    """A name with a slash or a leading dot names no image, whatever lies there."""
    store, _ = make(tmp_path / "images", ())
    with pytest.raises(UsageError):
        store.path(name)


def test_what_a_killed_maker_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Kill -9 while making: no version appears, and the next maker clears what is left, not what a living one makes."""
    store = ImageStore(str(tmp_path / "images"))
    code = (
        "import sys, time\nfrom cloister.host.image_store import ImageStore\n"
        "with ImageStore(sys.argv[1]).making() as work:\n"
        "    import os; os.mkdir(work + '/tree'); os.chmod(work + '/tree', 0)\n"
        "    print(work, flush=True); time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", code, store.directory]
    makers = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    works = [maker.stdout.readline().strip() for maker in makers if maker.stdout]
    try:
        makers[0].send_signal(signal.SIGKILL)
        makers[0].wait()
        assert all(os.path.isdir(work) for work in works)
        assert store.names() == []
        with store.making() as work:
            assert sorted(os.listdir(store.directory)) == sorted(os.path.basename(each) for each in (work, works[1]))
        assert store.clean() == []
    finally:
        for maker in makers:
            maker.kill()
            maker.communicate()
    assert store.clean() == [works[1]]
    assert os.listdir(store.directory) == []


def test_gc_keeps_the_newest_and_what_living_runs_use(tmp_path: Path) -> None:
    """Of five versions the newest two stay, and one that a run uses; a dry run removes nothing."""
    for version in range(1, 6):
        make(tmp_path / "images", (), version=version)
    where, records = places(tmp_path), _Records()
    living = frozenset({"a-run"})
    would = collect_images(where, records, living, keep=2, dry_run=True)
    assert [path[-1] for path in would] == ["1", "3"]
    assert ImageStore(where.store).versions("made") == [1, 2, 3, 4, 5]
    assert collect_images(where, records, living, keep=2, dry_run=False) == would
    assert ImageStore(where.store).versions("made") == [2, 4, 5]
    collect_images(where, records, None, keep=1, dry_run=False)
    assert ImageStore(where.store).versions("made") == [5]


class _Records(Store):
    """Records of one run, which uses version 2."""

    def __init__(self) -> None:
        pass

    def plan(self, run: str):
        class Vm:
            image, version = "made", 2

        class Launch:
            vm = Vm()

        class Plan:
            launch = Launch()

        return Plan() if run == "a-run" else None


def test_keys_are_made_private_and_a_passphrase_is_needed_again(tmp_path: Path) -> None:
    """The private key is 0600 and never replaced; a passphrase is asked for where there is one only."""
    path = f"{tmp_path}/key/image-key.pem"
    line = image_keys.generate(path, passphrase=b"made-up", comment="mine")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert b"ENCRYPTED" in Path(path).read_bytes()
    with pytest.raises(StepError) as caught:
        image_keys.generate(path)
    assert caught.value.reference == "image-key-exists"
    key = image_keys.load(path, lambda: b"made-up")
    assert line == key_line(key.public, comment="mine")
    for ask in (None, lambda: b"wrong", lambda: b""):
        with pytest.raises(DeniedError):
            image_keys.load(path, ask)
    os.chmod(path, 0o640)
    with pytest.raises(DeniedError):
        image_keys.load(path, lambda: b"made-up")
    image_keys.generate(f"{path}.2")
    image_keys.load(f"{path}.2")


def test_a_key_is_shown_by_nothing(tmp_path: Path) -> None:
    """Neither `repr` nor the public line holds the secret."""
    path = f"{tmp_path}/key/image-key.pem"
    line = image_keys.generate(path)
    body = Path(path).read_text().splitlines()[1]
    key = image_keys.load(path)
    assert body not in repr(key) + repr(vars(key)) + line


@pytest.mark.parametrize("spoil", ["directory", "file", "link", "fifo", "line"])
def test_a_trust_store_that_others_could_write_is_not_believed(tmp_path: Path, spoil: str) -> None:
    """Modes, links, other kinds of files, lines that are not understood: all of the store is refused."""
    folder = tmp_path / "trust.d"
    folder.mkdir(mode=0o755)
    good = folder / "a.pub"
    good.write_text(key_line("ab" * 32))
    (folder / "README").write_text("not a key\n")
    (folder / ".b.pub.swp").write_text("not a key\n")
    assert [key.public for key in image_keys.trust_store(str(folder), ME)] == ["ab" * 32]
    assert image_keys.trust_store(str(tmp_path / "none"), ME) == []
    match spoil:
        case "directory":
            folder.chmod(0o775)
        case "file":
            good.chmod(0o666)
        case "link":
            (folder / "b.pub").symlink_to(good)
        case "fifo":
            os.mkfifo(folder / "b.pub")
        case _:
            (folder / "b.pub").write_text("ssh-ed25519 AAAA\n")
    with pytest.raises(DeniedError) as caught:
        image_keys.trust_store(str(folder), ME)
    assert caught.value.reference == "image-trust-file"
    if os.getuid():
        with pytest.raises(DeniedError):
            image_keys.trust_store(str(folder), frozenset({0}))


def test_signing_and_whose_signature_counts(tmp_path: Path) -> None:
    """The user's own key counts by itself, another's by trust store or policy; several stand together."""
    where = places(tmp_path)
    make(tmp_path / "images", ())
    other = Signer()
    trusted = trust_of(where, Images(), os.getuid())
    with pytest.raises(DeniedError):
        look(where, trusted, "made")
    image_keys.generate(where.key)
    sign_image(where, "made", None, image_keys.load(where.key))
    assert look(where, trust_of(where, Images(), os.getuid()), "made").signer is not None
    image_keys.generate(f"{tmp_path}/other/k.pem")
    second = image_keys.load(f"{tmp_path}/other/k.pem")
    sign_image(where, "made", 1, second)
    os.rename(os.path.dirname(where.key), f"{tmp_path}/away")
    with pytest.raises(DeniedError):
        look(where, trust_of(where, Images(trust=(other.public,)), os.getuid()), "made")
    assert look(where, trust_of(where, Images(trust=(second.public.upper(),)), os.getuid()), "made")
    os.mkdir(where.trust, 0o700)
    Path(where.trust, "second.pub").write_text(key_line(second.public, names=("m*",)))
    assert look(where, trust_of(where, Images(), os.getuid()), "made")


def test_nobody_signs_what_was_changed(tmp_path: Path) -> None:
    """Signing looks at every byte first; twin: the untouched image is signed."""
    where = places(tmp_path)
    make(tmp_path / "images", ())
    image_keys.generate(where.key)
    key = image_keys.load(where.key)
    path = Path(ImageStore(where.store).path("made"), "root.img")
    change(path, 5000)
    with pytest.raises(DeniedError) as caught:
        sign_image(where, "made", 1, key)
    assert caught.value.reference == "image-changed"
    change(path, 5000)
    sign_image(where, "made", 1, key)
    with open_image(ImageStore(where.store), "made", trust_of(where, Images(), os.getuid())):
        pass


def test_the_lock_that_is_shown_is_the_signed_one(tmp_path: Path) -> None:
    """A changed list of packages is found as well: auditors read it."""
    signer = Signer()
    make(tmp_path / "images", (signer,))
    where = places(tmp_path)
    look(where, signer.trust(), "made")
    change(Path(ImageStore(where.store).path("made"), "lock.json"), 100)
    with pytest.raises(DeniedError) as caught:
        look(where, signer.trust(), "made")
    assert caught.value.reference == "image-changed"


def test_the_record_of_versions_only_rises(tmp_path: Path) -> None:
    """Noting an older one changes nothing, unless a person says so; each signer has a record of its own."""
    seen = SeenVersions(f"{tmp_path}/state/versions.json")
    assert seen.highest("dev", "k") == 0
    for version in (3, 5, 4):
        seen.note("dev", "k", version)
    assert (seen.highest("dev", "k"), seen.highest("dev", "other"), seen.highest("de", "v k")) == (5, 0, 0)
    seen.note("dev", "k", 2, lower=True)
    assert SeenVersions(seen.path).highest("dev", "k") == 2
    os.chmod(seen.path, 0o640)
    with pytest.raises(StepError):
        seen.highest("dev", "k")
